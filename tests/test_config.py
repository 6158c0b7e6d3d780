"""A mistake in a config is named, with its path and what would be right, before anything is
built.
"""

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pipeline.check import composed, main
from pipeline.config import build, check, problems

GOOD = ["recipe=emoji", "name=x", "data.shards=y", "tokenizer.path=clip"]


def complaint(*overrides, world_size=1):
    with pytest.raises((ValueError, HydraException)) as caught:
        check(composed("train", [*GOOD, *overrides]), world_size=world_size)
    return str(caught.value)


def test_the_good_config_is_good():
    check(composed("train", GOOD))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe=emojis"], ["recipe/emojis", "emoji"]),
        (["samples_sen=5"], ["samples_sen"]),
        (["optimizer.learning_rate=1"], ["learning_rate"]),
        (["+optimizer.learning_rate=1"], ["optimizer.learning_rate", "it takes: lr, betas"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["global_batch_size=many"], ["global_batch_size", "many"]),
        (["model.image._target_=pipeline.models.vit.Vit"], ["model.image: cannot import"]),
        (["~model.image.patch_size"], ["model.image", "needs 'patch_size'"]),
        (["micro_batch_size=300"], ["micro_batch_size: 300", "local batch of 256"]),
        (["samples_seen=100"], ["samples_seen: 100 is less than one batch of 256"]),
        (["schedule.warmup_samples=256000"], ["schedule.warmup_samples: 256000 is not below"]),
        (["data.shards=???"], ["data.shards: missing", "data.shards=..."]),
        (["+loss.extra.weight=1"], ["loss.extra"]),
        (["schedule.warmup_samples=${nothing}"], ["schedule.warmup_samples", "nothing"]),
        (["loss.softmax=5"], ["loss.softmax: 5 is no component", "conf/loss"]),
    ],
)
def test_a_mistake_is_named(overrides, words):
    text = complaint(*overrides)
    for word in words:
        assert word in text


def test_all_mistakes_come_at_once():
    text = complaint("+optimizer.a=1", "+data.b=2", "micro_batch_size=0")
    assert "3 problem(s)" in text


def test_a_batch_that_does_not_divide_names_two_that_do():
    text = complaint(world_size=3)
    assert "256 is not a multiple of 3 processes" in text
    assert "255 or 258" in text


def test_a_stray_node_is_refused():
    assert problems(OmegaConf.create({"extra": {"a": 1}})) == [
        "extra: nobody reads this: a node is a component (_target_) or a known group"
    ]


def test_what_a_constructor_refuses_has_a_path():
    cfg = composed("train", [*GOOD, "image_tokens.keep=1.5", "model.image.image_size=30"])
    with pytest.raises(ValueError, match="^image_tokens: keep 1.5 is outside"):
        build(cfg.image_tokens)
    with pytest.raises(ValueError, match="^model.image: image_size 30 is not a multiple"):
        build(cfg.model)
    with pytest.raises(ValueError, match="^keep 2 is outside"):
        build({"_target_": cfg.image_tokens._target_, "keep": 2})


def test_clip_check_judges_without_building(capsys):
    with pytest.raises(SystemExit) as done:
        main([*GOOD, "world_size=4"])
    assert done.value.code == 0
    with pytest.raises(SystemExit) as done:
        main([*GOOD, "world_size=7"])
    assert done.value.code == 2
    assert "not a multiple of 7" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["--all"])
    assert done.value.code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["image_tokens.keep=1.5"], "image_tokens: keep 1.5 is outside"),
        (["+optimizer.towers.visual.lr=1e-4"], "towers.visual: no parameter is in it"),
        (["optimizer=adafactor", "trainer=fsdp"], "use trainer=ddp"),
        (["samples_seen=9", "+phases.a.samples_seen=256000"], "set phases.a.samples_seen=..."),
        (
            ["+phases.a.samples_seen=256000", "+phases.a.frozen=[visual.*]"],
            "phase a: frozen: no parameter is called 'visual.*'",
        ),
    ],
)
def test_clip_check_finds_what_only_shapes_show(words, says, capsys):
    with pytest.raises(SystemExit) as done:
        main([*GOOD, "data.shards=???", *words])
    printed = capsys.readouterr().out
    assert done.value.code == 2 and printed.startswith("FAIL") and says in printed


@pytest.mark.parametrize("arguments", [[], ["world_size=x", *GOOD]])
def test_clip_check_says_how_it_is_used(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "clip-check" in capsys.readouterr().out
