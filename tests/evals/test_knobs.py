"""What a task can be told stands in its YAML."""

import inspect
from pathlib import Path
from pkgutil import resolve_name

import pytest
from omegaconf import OmegaConf

from pipeline.config import CONF

PATHS = sorted(Path(CONF, "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_argument_of_a_task_is_in_its_yaml(path):
    for name, node in OmegaConf.load(path).items():
        if name != "defaults":
            arguments = inspect.signature(resolve_name(node["_target_"])).parameters
            assert arguments.keys() == node.keys() - {"_target_"}, name
