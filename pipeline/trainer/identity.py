"""A name is one run: its directory, the config that it keeps, and what of that may change."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from pipeline.phases import flat, phases
from pipeline.shards import write_atomically
from pipeline.trainer.checkpoints import sweep
from pipeline.trainer.processes import alone, end_with_launcher, first_process

# What may change when a run is continued: it changes speed or what is seen of the run, not its
# result.
OPERATIONAL = (
    "micro_batch_size",
    "max_skipped_steps",
    "compile_towers",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "recipe_info",
    "allow_foreign_targets",
    "init",  # read once, before the first step
    "runs_dir",
    "trainer",
    "callbacks",
    "tracking",
    "data.workers",
    "data.shards",  # may have moved; the number of pairs in it is compared with the checkpoint
    "data.verify",
    "data.cache",
    "data.cache_gib",
    "data.max_bad_fraction",
)
RESULT = ("trainer.precision",)  # but for these of them
# Lightning's shorter words for the same
PRECISIONS = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def run_directory(cfg: DictConfig) -> Path:
    """runs_dir/name: never a timestamp, each rank would make its own."""
    return Path(cfg.runs_dir) / cfg.name


def without_phase(key: str) -> str:
    """phases.tune.trainer.devices -> trainer.devices."""
    return key.split(".", 2)[-1] if key.startswith("phases.") else key


def is_operational(key: str) -> bool:
    """Whether a key may change when a run is continued."""
    return key not in RESULT and any(f"{key}.".startswith(f"{known}.") for known in OPERATIONAL)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """A run's config as its directory keeps it: values for interpolations, phases whole."""
    plan = phases(cfg)
    if plan[0].name:
        cfg = cfg.copy()
        cfg.samples_seen = sum(phase.samples for phase in plan)
        cfg.global_batch_size = plan[0].config.global_batch_size
    ours = OmegaConf.to_container(cfg, resolve=True)
    whole = {p.name: OmegaConf.to_container(p.config, resolve=True) for p in plan if p.name}
    return ours | {"phases": whole}


def kept_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml. Raises ValueError when it is not whole."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, ValueError) as error:
        config = error
    if not isinstance(config, dict) or not config:
        raise ValueError(
            f"{path} is damaged: give it back from a copy, or remove it, and it is written anew "
            f"from this command, which must then be the one that began the run ({config!r:.200})"
        )
    return config


def constructor_defaults(node: Any, path: str = "") -> dict[str, Any]:
    """{dotted key: default} of the arguments that the components of a config have of themselves."""
    found: dict[str, Any] = {}
    if not isinstance(node, dict):
        return found
    if "_target_" in node:
        for name, argument in inspect.signature(resolve_name(node["_target_"])).parameters.items():
            if argument.default is not argument.empty:
                value = argument.default
                found[f"{path}.{name}"] = list(value) if isinstance(value, tuple) else value
    for key, value in node.items():
        found |= constructor_defaults(value, f"{path}.{key}".lstrip("."))
    return found


def _meant(key: str, value: Any) -> Any:
    if without_phase(key) == "trainer.precision":
        return PRECISIONS.get(str(value), str(value))
    return value


def claim(cfg: DictConfig, directory: Path) -> None:
    """Leave the resolved config in the run directory, or compare with the one that is there.

    Raises ValueError when the name belongs to a run with another config; the differing keys are
    listed.
    """
    path, ours = directory / "config.yaml", resolved(cfg)
    if path.exists():
        # A key that an older version did not know, or not write, had what is now its default.
        schema = OmegaConf.structured(OmegaConf.get_type(cfg))
        defaults = flat({k: schema[k] for k in schema if not OmegaConf.is_missing(schema, k)})
        mine, names = flat(ours), list(ours["phases"])
        each = {f"phases.{name}.{k}": v for name in names for k, v in defaults.items()}
        given = each | constructor_defaults(ours)
        defaults |= {key: value for key, value in given.items() if key in mine}
        kept = kept_config(path)
        theirs = defaults | flat(kept)
        differing = [
            f"  {key}: was {theirs.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(theirs.keys() | mine.keys())
            if _meant(key, theirs.get(key)) != _meant(key, mine.get(key))
            and not is_operational(without_phase(key))
            # a value that every phase has of its own is read by none
            and not (names and all(f"phases.{name}.{key}" in mine for name in names))
        ]
        order = list(kept.get("phases") or {})
        if order != names and set(order) == set(names):
            differing.append(f"  phases: were in the order {order}, now {names}")
        if differing:
            raise ValueError(
                f"{directory} is a run with another config; give a new name=..., or these values "
                "back:\n" + "\n".join(differing)
            )
        return
    if not first_process():
        return
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(ours)).encode())


@contextmanager
def claimed(cfg: DictConfig) -> Iterator[tuple[Path, bool]]:
    """The run directory of a config, tidied up, for as long as this process trains in it.

    Gives the directory, and whether this process may change what is in it (see `alone`).
    Raises ValueError when another process trains there, or it is the run of another config.
    """
    directory = run_directory(cfg)
    end_with_launcher()
    with alone(directory) as ours:
        if ours:
            sweep(directory)
        claim(cfg, directory)
        yield directory, ours
