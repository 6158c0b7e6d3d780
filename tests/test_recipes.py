"""Every YAML below conf/ is used and composes; every recipe trains. A new file is tested
unmentioned.
"""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.check import composed, everything
from pipeline.config import CONF, MISSING_WORD, build, check, problems
from pipeline.phases import phases

ROOTS = ("train", "train_captioner", "evaluate", "export", "curate", "report", "dashboard")
FILES = sorted(path.relative_to(CONF) for path in Path(CONF).rglob("*.yaml"))
GROUPS = sorted({path.parent.name for path in FILES if path.parent != Path()})


PRESETS = [(command, overrides) for command, overrides in everything() if command != "train"]


@pytest.mark.parametrize(("command", "overrides"), PRESETS, ids=str)
def test_presets_pass_the_check(command, overrides):
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


RECIPES = sorted(path.stem for path in Path(CONF, "recipe").glob("*.yaml"))
# of each phase: what the sources give as steps of warm-up
WARMUP_STEPS = {
    "clip_b32_laion400m": [2000],
    "clip_l14": [2000],
    "openclip_b16_datacomp": [10_000],
    "flip_l16": [781, 390],  # given in pairs: 40 and 20 times 1.28 M
    "clipa_v1_l16": [1563, 3571],
    "clipa_v2_h14": [3200, 800, 1600],
    "eva_clip_g14": [2000],
    "eva02_clip_b16": [2000],
    "eva_clip_18b": [2000],
    "metaclip_b32_400m": [2000],
    "metaclip_h14_2_5b": [2000],
    "metaclip2_h14_worldwide": [2000],
}
# of each phase: learning rate for each 256 pairs
RATES = {
    "flip_l16": [4e-6, 4e-8],
    "clipa_v1_l16": [8e-6, 8e-7],
    "clipa_v2_h14": [8e-6, 4e-7, 1e-7],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_divide_over_a_node(recipe):
    cfg = composed("train", [f"recipe={recipe}", "name=x", "data.shards=y"])
    check(cfg, world_size=8, complete=False)
    plan = phases(cfg)
    steps = [p.config.schedule.warmup_samples // p.config.global_batch_size for p in plan]
    rates = [p.config.optimizer.lr * 256 / p.config.global_batch_size for p in plan]
    assert steps == WARMUP_STEPS.get(recipe, steps)
    assert rates == pytest.approx(RATES.get(recipe, rates))


def test_recipes_of_two_towers_ask_for_both():
    for recipe in ("eva_clip_g14", "eva02_clip_b16", "eva_clip_18b"):
        cfg = composed("train", [f"recipe={recipe}", "name=x", "data.shards=y"])
        assert OmegaConf.missing_keys(cfg) == {"init.image", "init.text"}
    cfg = composed("train", ["recipe=chinese_clip_b16", "name=x", "data.shards=y"])
    assert "init.image" in OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_start_from_other_weights_or_none(recipe):
    """Whatever a recipe starts from can be replaced: by nothing, or by a checkpoint."""
    words = [f"recipe={recipe}", "name=x", "data.shards=y"]
    cfg = composed("train", [*words, "init=none"])
    check(cfg, world_size=8, complete=False)
    assert cfg.init is None
    cfg = composed("train", [*words, "init=weights", "init.model=z"])
    check(cfg, world_size=8, complete=False)
    assert (cfg.init.model, cfg.init.image, cfg.init.text) == ("z", None, None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_small_under_debug(recipe):
    """Twenty steps, in equal shares over the phases."""
    cfg = composed("train", [f"recipe={recipe}", "debug=tiny", "name=x", "data.shards=y"])
    check(cfg)
    plan = phases(cfg)
    assert plan[-1].end_step == 20 and max(p.steps for p in plan) - min(p.steps for p in plan) < 2
    assert {p.config.global_batch_size for p in plan} == {32}
    model = build(cfg.model)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) < 7e6
    )  # of which 4.7 M are words
