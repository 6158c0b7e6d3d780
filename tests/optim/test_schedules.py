import json
from pathlib import Path

import pytest

from pipeline.optim.schedules import WarmupCosine

PARITY = Path(__file__).parents[1] / "data" / "parity" / "schedules.json"


@pytest.mark.parametrize("batch", [1, 48])
def test_equals_open_clip_step_by_step(batch: int) -> None:
    cases = [
        c for c in json.loads(PARITY.read_text())["open_clip"].values() if c["kind"] == "cosine"
    ]
    assert cases
    for case in cases:
        schedule = WarmupCosine(warmup_samples=case["warmup"] * batch)
        for step, expected in enumerate(case["lr"]):
            factor = schedule.factor(step * batch, case["steps"] * batch, batch)
            assert case["base_lr"] * factor == pytest.approx(expected, rel=1e-12, abs=1e-24)


def test_final_fraction_is_reached_and_kept() -> None:
    schedule = WarmupCosine(warmup_samples=100, final_fraction=0.1)
    assert schedule.factor(100, 1100, 10) == pytest.approx(1.0)
    assert schedule.factor(600, 1100, 10) == pytest.approx(0.55)
    assert schedule.factor(1100, 1100, 10) == pytest.approx(0.1)
    assert schedule.factor(5000, 1100, 10) == pytest.approx(0.1)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert WarmupCosine(warmup_samples=0).factor(0, 1000, 10) == 1.0


def test_warmup_that_is_no_multiple_of_the_batch_does_not_overshoot() -> None:
    assert WarmupCosine(warmup_samples=100).factor(96, 1000, 32) == 1.0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_samples 100 is not below the run's 100 samples"):
        WarmupCosine(warmup_samples=100).factor(0, 100, 10)
    with pytest.raises(ValueError, match="negative"):
        WarmupCosine(warmup_samples=-1)
    with pytest.raises(ValueError, match="final_fraction"):
        WarmupCosine(warmup_samples=1, final_fraction=1.5)
