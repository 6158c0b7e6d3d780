"""COMMAND: is this config right, and what will it cost? `python -m pipeline.check recipe=R
[overrides]`, or `--all`, which does not count costs. Builds nothing but shapes.

Works on a laptop for any cluster: `world_size=N` is the number of processes to divide the batch by.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from pipeline.command import explained
from pipeline.config import CONF, MISSING_WORD, listed, run_problems
from pipeline.phases import phases
from pipeline.trainer.options import option_problems

MFU = 0.4  # share of the peak that a run is assumed to reach
# a size that is still to be given; what cannot be made without its files, or without numbers
UNCOUNTED = (OmegaConfBaseException, InstantiationException)

USAGE = """usage: clip-check recipe=R [key=value ...] [world_size=N] [mfu=0.4]
                                                      and what each phase costs: GPU-hours, memory
       clip-check --config curate [key=value ...]     another command's config: curate evaluate
       export
       clip-check --all                               every recipe and every dataset preset"""


def processes(cfg: DictConfig) -> int:
    """How many processes the config (or the launcher) will start."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_NTASKS" in os.environ and "SLURM_JOB_ID" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    devices = OmegaConf.select(cfg, "trainer.devices", default=1)
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    return nodes * devices if isinstance(devices, int) and devices > 0 else nodes


def composed(name: str, overrides: list[str]) -> DictConfig:
    """A command's config with overrides, as the command itself would compose it."""
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        return compose(config_name=name, overrides=overrides)


def everything() -> Iterator[tuple[str, list[str]]]:
    """(command, overrides) of every recipe and preset, with the values only a user knows filled
    in.
    """
    for path in sorted(Path(CONF, "recipe").glob("*.yaml")):
        yield "train", [f"recipe={path.stem}", "name=check", "data.shards=shards"]
    for path in sorted(Path(CONF, "dataset").glob("*.yaml")):
        yield "curate", [f"dataset={path.stem}", "pool=pool", "out=shards"]


@dataclass(frozen=True)
class Verdict:
    """problems: as text, "" for none. missing: values that the user has still to give, by path."""

    cfg: DictConfig | None
    problems: str
    missing: list[str]


def verdict(name: str, overrides: list[str], world_size: int | None) -> Verdict:
    """What is wrong with a config; a value that is `???` is still to be given."""
    cfg = None
    try:
        cfg = composed(name, overrides)
        found = run_problems(cfg, world_size or processes(cfg), overrides)
        found += option_problems(cfg) if all(MISSING_WORD in line for line in found) else []
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return Verdict(cfg, str(error) if cfg is not None else explained(error), [])
    missing = [line for line in found if MISSING_WORD in line]
    wrong = [line for line in found if line not in missing]
    paths = [line.partition(":")[0] for line in dict.fromkeys(missing)]
    return Verdict(cfg, listed(wrong) if wrong else "", paths)


def rehearsed(found: Verdict) -> Verdict:
    """The same, with what a training run's phases say when they are built on shapes alone."""
    # torch and the towers: seconds that --all saves
    from pipeline.trainer.rehearsal import rehearse_shapes

    try:
        rehearse_shapes(phases(found.cfg))
    except UNCOUNTED:
        return found
    except ValueError as error:
        return replace(found, problems=listed([str(error)]))
    return found


def print_costs(cfg: DictConfig, world_size: int, mfu: float) -> None:
    """Tables of what a training run costs; a line that says why where it cannot be counted."""
    from pipeline.cost.phase import phase_cost
    from pipeline.cost.table import cost_tables

    console = Console(width=None if sys.stdout.isatty() else 160)
    for key, text in cfg.recipe_info.items():
        console.print(f"  {key}: {text}", highlight=False, soft_wrap=True)
    try:
        costs = [phase_cost(phase, world_size) for phase in phases(cfg)]
    except (*UNCOUNTED, ValueError) as error:
        console.print(f"  no costs: {str(error).splitlines()[0]}", highlight=False)
        return
    console.print(cost_tables(costs, mfu))


def option(given: list[str], name: str, least: float) -> tuple[str | None, list[str]]:
    """The last name=value among the words, and the others. Exits with 2 unless it is a number
    above `least`.
    """
    values = [word.partition("=")[2] for word in given if word.startswith(f"{name}=")]
    for value in values:
        try:
            good = float(value) > least
        except ValueError:
            good = False
        if not good:
            print(f"clip-check: {name}={value}: a number above {least}")
            sys.exit(2)
    rest = [word for word in given if not word.startswith(f"{name}=")]
    return (values[-1] if values else None), rest


def main(arguments: list[str] | None = None) -> None:
    """Print what is wrong, and what a single training config costs; exit 2 if anything is wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or "--help" in given or "-h" in given:
        print(USAGE)
        sys.exit(0 if given else 2)
    size, given = option(given, "world_size", 0)
    mfu, given = option(given, "mfu", 0)
    world_size = int(size) if size else None
    name = "train"
    if given[:1] == ["--config"]:
        name, given = (given[1] if len(given) > 1 else ""), given[2:]
    everywhere = given == ["--all"]
    failed = 0
    for command, overrides in everything() if everywhere else [(name, given)]:
        found = verdict(command, overrides, world_size)
        if command == "train" and not everywhere and not found.problems:
            found = rehearsed(found)
        failed += bool(found.problems)
        print(f"{'FAIL' if found.problems else 'ok  '} {command} {' '.join(overrides)}")
        if found.problems:
            print(f"  {found.problems}")
        if found.missing and not everywhere:
            print(f"  still to give: {', '.join(f'{path}=...' for path in found.missing)}")
        if command == "train" and not everywhere and not found.problems:
            print_costs(found.cfg, world_size or processes(found.cfg), float(mfu or MFU))
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
