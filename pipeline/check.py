"""COMMAND: is this config right? `python -m pipeline.check recipe=R [overrides]` or `--all`.
Builds nothing.

Works on a laptop for any cluster: `world_size=N` is the number of processes to divide the batch by.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import CONF, check

USAGE = """usage: clip-check recipe=R [key=value ...] [world_size=N]
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


def verdict(
    name: str, overrides: list[str], world_size: int | None, *, complete: bool = True
) -> str | None:
    """The problems of a config as text, or None. complete: a value that is `???` is a problem."""
    try:
        cfg = composed(name, overrides)
        check(cfg, world_size=world_size or processes(cfg), complete=complete)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return str(error)
    return None


def main(arguments: list[str] | None = None) -> None:
    """Print what is wrong; exit 2 if anything is."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or "--help" in given or "-h" in given:
        print(USAGE)
        sys.exit(0 if given else 2)
    sizes = [a.partition("=")[2] for a in given if a.startswith("world_size=")]
    if any(not size.isdigit() or int(size) < 1 for size in sizes):
        print(f"clip-check: world_size={sizes[-1]}: a number of processes, at least 1")
        sys.exit(2)
    world_size = int(sizes[-1]) if sizes else None
    given = [a for a in given if not a.startswith("world_size=")]
    name = "train"
    if given[:1] == ["--config"]:
        name, given = (given[1] if len(given) > 1 else ""), given[2:]
    everywhere = given == ["--all"]
    jobs = list(everything()) if everywhere else [(name, given)]
    failed = 0
    for command, overrides in jobs:
        problem = verdict(command, overrides, world_size, complete=not everywhere)
        failed += problem is not None
        print(f"{'FAIL' if problem else 'ok  '} {command} {' '.join(overrides)}")
        if problem:
            print(f"  {problem}")
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
