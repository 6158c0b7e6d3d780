import math

import pytest
import torch
from torch import nn

from pipeline.optim.average import ExponentialAverage


def test_a_constant_decay_is_the_geometric_sum() -> None:
    weights = [torch.randn(3, 4) for _ in range(6)]
    parameter = nn.Parameter(weights[0].clone())
    ema = ExponentialAverage(decay=0.9)
    ema.follow({"w": parameter})
    for step, weight in enumerate(weights[1:]):
        parameter.data = weight
        ema.update({"w": parameter}, step=step, total=5)
    expected = 0.9**5 * weights[0] + sum(0.1 * 0.9 ** (5 - k) * weights[k] for k in range(1, 6))
    torch.testing.assert_close(ema.weights["w"], expected)


def test_the_cosine_goes_from_decay_to_final_decay() -> None:
    """SLIP's and A-CLIP's schedule: final + (start - final) (1 + cos(pi t / T)) / 2."""
    ema = ExponentialAverage(decay=0.996, final_decay=1.0)
    for step in range(0, 101, 10):
        expected = 1.0 + 0.5 * (0.996 - 1.0) * (1 + math.cos(math.pi * step / 100))
        assert ema.decay_at(step, 100) == pytest.approx(expected, rel=1e-12)
    assert ema.decay_at(0, 100) == pytest.approx(0.996)
    assert ema.decay_at(100, 100) == ema.decay_at(150, 100) == 1.0


def test_low_precision_weights_are_averaged_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ema = ExponentialAverage(decay=0.9999)
    ema.follow({"w": parameter})
    parameter.data.fill_(1)
    for step in range(100):
        ema.update({"w": parameter}, step=step, total=100)
    expected = torch.full((2,), 1 - 0.9999**100)
    torch.testing.assert_close(ema.weights["w"], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("decay", "final"), [(1.0, None), (-0.1, None), (0.9, 0.5), (0.9, 1.1)])
def test_what_makes_no_sense_is_refused(decay: float, final: float | None) -> None:
    with pytest.raises(ValueError, match="decay"):
        ExponentialAverage(decay=decay, final_decay=final)
