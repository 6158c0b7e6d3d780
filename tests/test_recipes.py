"""Every YAML below conf/ is used and composes; every recipe trains. A new file is tested
unmentioned.
"""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.check import composed, everything
from pipeline.config import CONF, MISSING_WORD, build, check, problems

ROOTS = ("train", "train_captioner", "evaluate", "export", "curate")
FILES = sorted(path.relative_to(CONF) for path in Path(CONF).rglob("*.yaml"))
GROUPS = sorted({path.parent.name for path in FILES if path.parent != Path()})


@pytest.mark.parametrize(("command", "overrides"), list(everything()), ids=str)
def test_recipes_and_presets_pass_the_check(command, overrides):
    check(composed(command, overrides), complete=False)


@pytest.mark.parametrize("name", ROOTS)
def test_roots_compose_with_a_closed_schema(name):
    overrides = {"train": ["recipe=emoji"], "evaluate": ["eval=emoji"]}.get(name, [])
    if name == "export":
        overrides = ["format=transformers"]
    cfg = composed(name, overrides)
    assert OmegaConf.is_struct(cfg) or OmegaConf.get_type(cfg) is not dict


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != Path()], ids=str)
def test_every_component_file_fits_its_constructor(file):
    """Nodes that stand alone are checked against the signature; `???` is for the user to fill."""
    cfg = OmegaConf.load(Path(CONF) / file)
    cfg.pop("defaults", None)  # Hydra's, gone when composed
    found = [
        problem
        for problem in problems(cfg, str(file.parent.name))
        if MISSING_WORD not in problem
        and "Interpolation" not in problem
        and "nobody reads this" not in problem
        and "needs '" not in problem
    ]
    assert found == []


def test_component_files_explain_themselves():
    """A recipe states source, expected result and price."""
    for path in sorted(Path(CONF, "recipe").glob("*.yaml")):
        info = OmegaConf.load(path).recipe_info
        assert {"source", "expected", "price"} <= set(info), path


@pytest.mark.parametrize("recipe", sorted(p.stem for p in Path(CONF, "recipe").glob("*.yaml")))
def test_recipes_build_under_debug(recipe):
    cfg = composed("train", [f"recipe={recipe}", "debug=tiny", "name=x", "data.shards=y"])
    model = build(cfg.model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
