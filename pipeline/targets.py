"""Which names a config may call: a config is data, and calling any name in it would make it code.

Hydra calls whatever `_target_` names, `os.system` too. Ours are the classes of these packages,
which are components, and a few names beside them; anything else needs `allow_foreign_targets=true`.
"""

import inspect
import pkgutil
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

OURS = ("pipeline", "curation")
# other than classes of ours
ALLOWED = {
    "lightning.pytorch.Trainer",
    "pipeline.data.word_classes.word_classes",
    "pipeline.tracking.wandb.wandb_logger",
}
MAX_CONFIG = 1 << 20  # bytes; the largest config of ours has 40 kB
MAX_DEPTH = 50  # the parser's time grows with the square of it


def foreign_targets(node: Any, path: str = "") -> list[str]:
    """`path: reason` of each name in a config that is not ours. Imports only our modules."""
    found: list[str] = []
    if isinstance(node, ListConfig):
        keys = range(len(node))
    elif isinstance(node, DictConfig) and not node._is_none():
        keys = list(node)
        if "_target_" in node and not _is_ours(node._get_node("_target_")._value()):
            found.append(
                f"{path}._target_: {node._get_node('_target_')._value()} is no component of "
                "pairwright; if you know what it does, give allow_foreign_targets=true"
            )
    else:
        return found
    for key in keys:
        try:
            value = node[key]
        except OmegaConfBaseException:  # missing, or points nowhere: named by the other checks
            continue
        found += foreign_targets(value, f"{path}.{key}".lstrip("."))
    return found


def _is_ours(name: Any) -> bool:
    if name in ALLOWED:
        return True
    if not isinstance(name, str) or name.split(".")[0] not in OURS or "${" in name:
        return False
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return True  # nothing there to call: the check of signatures says so
    # not what a module of ours has imported
    return inspect.isclass(target) and target.__module__.split(".")[0] in OURS


def read_config(path: Path, *, allow_foreign_targets: bool) -> DictConfig:
    """A config file that another may have written: values alone, and names of ours.

    Raises ValueError for one that is no mapping, has YAML aliases (a few lines can stand for
    gigabytes), an interpolation (it could read the environment), or a foreign `_target_`.
    """
    try:
        text = path.read_bytes()[: MAX_CONFIG + 1].decode()
        _refuse_growth(text)
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no config of a run: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} is no config of a run: need keys and values")
    if "${" in text:
        raise ValueError(f"{path}: an interpolation, and pipeline.train leaves none; do not use it")
    found = [] if allow_foreign_targets else foreign_targets(config)
    if found:
        raise ValueError(f"{path} is not to be trusted:\n" + "\n".join(f"  {f}" for f in found))
    return config


def _refuse_growth(text: str) -> None:
    """Raise ValueError for YAML that takes more time or memory than its length says."""
    if len(text) > MAX_CONFIG:
        raise ValueError(f"larger than {MAX_CONFIG} bytes")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"YAML aliases, or nested deeper than {MAX_DEPTH}")
