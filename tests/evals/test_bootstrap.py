"""Confidence intervals of means."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from pipeline.evals import bootstrap
from pipeline.evals.bootstrap import interval, mean, mean_of_means


@pytest.mark.parametrize("draw", ["gamma", "binary"])
def test_it_is_the_percentile_interval_of_scipy(draw):
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, size=400) if draw == "gamma" else (rng.random(400) < 0.2) * 1.0
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = interval(torch.from_numpy(values), resamples=4000)
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.07 * width)


@pytest.mark.parametrize("factor", [1.0, 2.0])  # hits have a way of their own
def test_it_covers_the_truth_as_often_as_it_says(factor):
    generator = torch.Generator().manual_seed(0)
    hits = (torch.rand(200, 300, generator=generator) < 0.3).double() * factor
    bounds = [interval(row, resamples=300, seed=n) for n, row in enumerate(hits)]
    covered = sum(low <= 0.3 * factor <= high for low, high in bounds)
    # 95 % of 200 is 190, with a standard deviation of 3
    assert 180 <= covered <= 199
    assert interval(hits[0], level=0.5)[0] > interval(hits[0])[0]


def test_it_is_the_same_every_time_and_in_any_pieces(monkeypatch):
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    whole = interval(values)
    assert interval(values) == whole != interval(values, seed=1)
    monkeypatch.setattr(bootstrap, "PIECE", 700)
    assert interval(values) == whole


def test_an_estimate_is_a_number():
    found = mean(torch.tensor([True, False, True, True]))
    assert found.low < found == 0.75 < found.high
    assert json.dumps({"top1": found}) == '{"top1": 0.75}'
    always = mean(torch.full((5,), 0.4, dtype=torch.float64))
    assert always.low == pytest.approx(always.high) == pytest.approx(0.4)


def test_the_mean_over_classes_draws_classes():
    hits, labels = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1]), torch.tensor([7] + [2] * 8)
    found = mean_of_means(hits, labels)
    assert found == pytest.approx((1 + 5 / 8) / 2)
    assert (found.low, found.high) == interval(torch.tensor([5 / 8, 1]).double())
    # one item a class: the same as the items'
    ones = mean_of_means(hits, torch.arange(9))
    assert (ones.low, ones.high) == interval(hits) and ones.low < ones.high


@pytest.mark.parametrize(
    ("values", "knobs"),
    [(torch.ones(0), {}), (torch.ones(2, 2), {}), (torch.ones(3), {"level": 1.0})],
)
def test_what_has_no_interval(values, knobs):
    with pytest.raises(ValueError, match="n > 0"):
        interval(values, **knobs)
