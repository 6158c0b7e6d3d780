import json
import math
from pathlib import Path

import pytest

from pipeline.optim.schedules import Constant, ConstantCooldown, ReciprocalSqrt, WarmupCosine

PARITY = Path(__file__).parents[1] / "data" / "parity" / "schedules.json"
OPEN_CLIP = json.loads(PARITY.read_text())["open_clip"]


def ours(case: dict, batch: int) -> object:
    warmup = case["warmup"] * batch
    if case["kind"] == "cosine":
        return WarmupCosine(warmup_samples=warmup)
    if case["kind"] == "const":
        return Constant(warmup_samples=warmup)
    return ConstantCooldown(
        warmup_samples=warmup,
        cooldown_fraction=case["cooldown_steps"] / case["steps"],
        power=case["cooldown_power"],
        final_fraction=case["cooldown_end_lr"] / case["base_lr"],
    )


@pytest.mark.parametrize("batch", [1, 48])
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_equals_open_clip_step_by_step(name: str, batch: int) -> None:
    case = OPEN_CLIP[name]
    schedule = ours(case, batch)
    for step, expected in enumerate(case["lr"]):
        factor = schedule.factor(step * batch, case["steps"] * batch, batch)
        assert case["base_lr"] * factor == pytest.approx(expected, rel=1e-12, abs=1e-24)


def test_final_fraction_is_reached_and_kept() -> None:
    schedule = WarmupCosine(warmup_samples=100, final_fraction=0.1)
    assert schedule.factor(100, 1100, 10) == pytest.approx(1.0)
    assert schedule.factor(600, 1100, 10) == pytest.approx(0.55)
    assert schedule.factor(1100, 1100, 10) == pytest.approx(0.1)
    assert schedule.factor(5000, 1100, 10) == pytest.approx(0.1)
    cooled = ConstantCooldown(warmup_samples=0, cooldown_fraction=0.5, final_fraction=0.1)
    assert [cooled.factor(done, 1000, 10) for done in (0, 500, 750, 1000, 2000)] == pytest.approx(
        [1, 1, 0.55, 0.1, 0.1]
    )


def test_the_warmup_can_start_above_zero() -> None:
    schedule = WarmupCosine(warmup_samples=100, initial_fraction=0.2)
    assert [schedule.factor(done, 1000, 10) for done in (0, 40, 90)] == pytest.approx(
        [0.28, 0.6, 1.0]
    )


@pytest.mark.parametrize("batch", [1, 32])
def test_reciprocal_square_root_equals_its_formula(batch: int) -> None:
    """big_vision's formula in steps, where the warm-up is (step + 1) / warmup as everywhere."""
    warmup, timescale, cooldown, steps = 10, 25, 20, 100
    schedule = ReciprocalSqrt(
        warmup_samples=warmup * batch,
        timescale_samples=timescale * batch,
        cooldown_fraction=cooldown / steps,
    )
    for step in range(steps):
        expected = 1 / math.sqrt(1 + (step - warmup) / timescale) if step >= warmup else 1
        expected *= min(1, (step + 1) / warmup) * min(1, (steps - step) / cooldown)
        assert schedule.factor(step * batch, steps * batch, batch) == pytest.approx(
            expected, rel=1e-12
        )


def test_without_a_cooldown_the_runs_length_is_not_needed() -> None:
    for schedule in (
        Constant(warmup_samples=10),
        ConstantCooldown(warmup_samples=10, cooldown_fraction=0.0),
        ReciprocalSqrt(warmup_samples=10, timescale_samples=50, cooldown_fraction=0.0),
    ):
        short = [schedule.factor(done, 100, 5) for done in range(0, 100, 5)]
        assert short == [schedule.factor(done, 10_000, 5) for done in range(0, 100, 5)]
        assert min(short) > 0


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert WarmupCosine(warmup_samples=0).factor(0, 1000, 10) == 1.0
    assert Constant(warmup_samples=0).factor(0, 1000, 10) == 1.0


def test_warmup_that_is_no_multiple_of_the_batch_does_not_overshoot() -> None:
    assert WarmupCosine(warmup_samples=100).factor(96, 1000, 32) == 1.0


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (WarmupCosine, {"warmup_samples": -1}, "warmup_samples -1 is negative"),
        (WarmupCosine, {"warmup_samples": 1, "final_fraction": 1.5}, "final_fraction 1.5"),
        (WarmupCosine, {"warmup_samples": 1, "initial_fraction": -1}, "initial_fraction -1"),
        (Constant, {"warmup_samples": -1}, "negative"),
        (ConstantCooldown, {"warmup_samples": 1, "cooldown_fraction": 2}, "cooldown_fraction 2"),
        (
            ConstantCooldown,
            {"warmup_samples": 1, "cooldown_fraction": 0.1, "power": 0},
            "power 0 must be positive",
        ),
        (
            ReciprocalSqrt,
            {"warmup_samples": 1, "cooldown_fraction": 0.1, "timescale_samples": 0},
            "timescale_samples 0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(kind: type, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**arguments)


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_samples 100 is not below the run's 100 samples"):
        WarmupCosine(warmup_samples=100).factor(0, 100, 10)
    for schedule in (
        ConstantCooldown(warmup_samples=60, cooldown_fraction=0.5),
        ReciprocalSqrt(warmup_samples=60, timescale_samples=9, cooldown_fraction=0.5),
    ):
        with pytest.raises(ValueError, match="60 and a cool-down of 50 samples .* run's 100"):
            schedule.factor(0, 100, 10)
