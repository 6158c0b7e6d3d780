"""A phase is the run's config with changes: what may change, what follows, what is refused."""

import pytest

from pipeline.check import composed
from pipeline.config import check, run_problems
from pipeline.phases import phases

TWO = [
    "recipe=emoji",
    "name=x",
    "data.shards=y",
    "tokenizer.path=clip",
    "samples_seen=???",
    "+phases.small.samples_seen=51200",
    "+phases.small.model.image.image_size=16",
    "+phases.small.schedule.warmup_samples=512",
    "+phases.large.samples_seen=12900",
    "+phases.large.global_batch_size=128",
    "+phases.large.schedule.warmup_samples=0",
    "+phases.large.image_tokens=null",
]


def complaint(*overrides, world_size=1):
    with pytest.raises(ValueError, match="problem") as caught:
        check(composed("train", [*TWO, *overrides]), world_size=world_size)
    return str(caught.value)


def test_steps_and_pairs_are_counted_through():
    cfg = composed("train", TWO)
    check(cfg)
    small, large = phases(cfg)
    assert (small.name, small.first_step, small.first_sample, small.steps) == ("small", 0, 0, 200)
    assert (large.name, large.first_step, large.first_sample) == ("large", 200, 51200)
    assert large.steps == 100 and large.samples == 12800 and large.end_step == 300
    assert large.samples_at(200) == 51200 and large.samples_at(201) == 51328


def test_what_a_phase_does_not_name_is_the_runs_and_interpolations_follow():
    small, large = phases(composed("train", TWO))
    assert small.config.transform.image_size == small.config.model.image.image_size == 16
    assert large.config.transform.image_size == 32
    assert small.config.image_tokens.keep == 0.25 and large.config.image_tokens is None
    assert small.config.optimizer == large.config.optimizer
    assert not small.config.phases and not large.config.phases


def test_another_component_replaces_the_runs():
    target = "pipeline.optim.schedules.WarmupCosine"
    same = composed("train", [*TWO, f"+phases.small.schedule._target_={target}"])
    assert phases(same)[0].config.schedule.final_fraction == 0.0
    policy = "+phases.small.image_tokens._target_=pipeline.models.vit.PatchEmbed"
    assert "keep" not in phases(composed("train", [*TWO, policy]))[0].config.image_tokens


def test_a_run_without_phases_is_one():
    cfg = composed("train", [*TWO[:4]])
    (only,) = phases(cfg)
    assert only.name == "" and only.config is cfg and only.steps == 1000


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+phases.small.seed=3", "phases.small.seed: belongs to the run"),
        ("+phases.small.trainer.devices=2", "phases.small.trainer: belongs to the run"),
        ("+phases.small.lrr=3", "phases.small.lrr: a run has no such key"),
        ("+phases.small.optimizer.lrr=3", "phases.small.optimizer.lrr: "),
        ("+phases.large.model.image.width=8", "phases.large.model.image.width: a phase cannot"),
        ("+phases.large.schedule.warmup_samples=99999", "phases.large.schedule.warmup_samples"),
        ("+phases.large.optimizer_state=lose", "'lose' is neither"),
        ("~phases.large.samples_seen", "phases.large.samples_seen: missing"),
        ("phases.large=5", "phases.large: 5 changes nothing: give what"),
        ("+phases.small.image_tokens=grid", "phases.small.image_tokens: 'grid' is no component"),
        ("+phases.small.tokenizer.path=other", "phases.small.tokenizer.path: a phase cannot"),
        ("optimizer.lr=fast", "\n  optimizer.lr:"),  # wrong in every phase: named once
    ],
)
def test_mistakes_are_named(override, words):
    overrides = [override]
    if override.startswith(("+phases.large.schedule", "+phases.small.sch")):
        overrides = [override.removeprefix("+")]
    assert words in complaint(*overrides)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("samples_seen=999", "phases.small.samples_seen=..., phases.large.samples_seen=..."),
        ("schedule.warmup_samples=9", "phases.small.schedule.warmup_samples=..., phases.large"),
        ("image_tokens.keep=0.5", "phases.small.image_tokens.keep=..., phases.large.image_tokens="),
        ("+every_phase.samples_seen=2560 samples_seen=99", "set every_phase.samples_seen=..."),
    ],
)
def test_a_word_that_every_phase_overrules_is_named(word, words):
    given = [*TWO, "+phases.small.image_tokens.keep=0.75", *word.split()]
    (found,) = run_problems(composed("train", given), 1, given)
    assert found.startswith(word.split()[-1].partition("=")[0]) and words in found


def test_a_word_for_every_phase_of_a_run_without_any_is_named():
    given = ["recipe=emoji", "name=x", "data.shards=y", "tokenizer.path=clip"]
    word = "+every_phase.samples_seen=2560"
    (found,) = run_problems(composed("train", [*given, word]), 1, [*given, word])
    assert found.endswith("the run has no phases: set samples_seen")


@pytest.mark.parametrize(
    "word", ["samples_seen=???", "global_batch_size=64", "image_tokens=block", "optimizer.lr=1"]
)
def test_a_word_that_some_phase_heeds_is_right(word):
    given = [*TWO, "+phases.small.image_tokens.keep=0.75", word]
    assert run_problems(composed("train", given), 1, given) == []


def test_a_batch_is_checked_in_each_phase():
    text = complaint("phases.large.global_batch_size=100", world_size=8)
    assert "phases.large.global_batch_size: 100 is not a multiple of 8" in text
    assert "phases.small" not in text


THREE = [
    *TWO,
    "every_phase.samples_seen=2560",
    "every_phase.schedule.warmup_samples=64",
    "every_phase.global_batch_size=128",
    "+phases.last.samples_seen=99999",
    "+phases.last.optimizer.lr=0.5",
]
THREE = [word.replace("every_phase", "+every_phase") for word in THREE]


def test_what_every_phase_says_is_said_last():
    cfg = composed("train", THREE)
    check(cfg)
    plan = phases(cfg)
    assert [phase.steps for phase in plan] == [6, 7, 7]  # of 20, in equal shares
    assert {p.config.schedule.warmup_samples for p in plan} == {64}
    assert {p.config.global_batch_size for p in plan} == {128}
    assert plan[2].config.optimizer.lr == 0.5 and plan[0].config.model.image.image_size == 16
    assert not plan[0].config.every_phase


def test_every_phase_can_be_taken_away():
    plan = phases(composed("train", [*THREE, "every_phase=null"]))
    assert [phase.samples for phase in plan] == [51200, 12800, 99840]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+every_phase.seed=3", "every_phase.seed: belongs to the run as a whole"),
        ("+every_phase.lrr=3", "every_phase.lrr: a run has no such key"),
        ("+every_phase.optimizer.lrr=3", "  optimizer.lrr: "),
        ("+every_phase.model.image.width=8", "phases.small.model.image.width: a phase cannot"),
    ],
)
def test_mistakes_in_every_phase_are_named(override, words):
    assert words in complaint(override)
