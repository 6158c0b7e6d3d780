"""The subset against a sort of all draws."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.select import random_subset
from curation.select.random_subset import RandomSubset
from curation.step import uniform

UIDS = [f"pair-{n}" for n in range(203)]


def decide(fraction, uids, *, cuts=(), seed=0):
    """{uid: reason}, each part measured and applied apart."""
    bounds = [0, *cuts, len(uids)]
    parts = [
        pa.table({"uid": pa.array(uids[a:b], pa.string())}) for a, b in itertools.pairwise(bounds)
    ]
    selector = RandomSubset(fraction=fraction)
    combined = selector.combine([selector.measure(part) for part in parts])
    found = {}
    for part in parts:
        answer = selector.apply(part, combined, seed)
        assert answer.type == pa.string()
        found.update(zip(part["uid"].to_pylist(), answer.to_pylist(), strict=True))
    return found


def kept(reasons):
    assert set(reasons.values()) <= {None, "random"}
    return {uid for uid, reason in reasons.items() if reason is None}


@pytest.mark.parametrize("fraction", [0.0, 0.004, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_smallest_draws_stay_exactly_that_many(fraction, seed):
    draws = dict(zip(UIDS, uniform(seed, "random_subset", UIDS), strict=True))
    expected = sorted(UIDS, key=lambda uid: (draws[uid], uid))[: int(len(UIDS) * fraction)]
    assert kept(decide(fraction, UIDS, seed=seed)) == set(expected)
    assert kept(decide(fraction, UIDS[::-1], cuts=(0, 50, 51), seed=seed)) == set(expected)


def test_seeds_differ_and_fractions_are_nested():
    assert kept(decide(0.3, UIDS, seed=0)) != kept(decide(0.3, UIDS, seed=1))
    assert kept(decide(0.3, UIDS)) < kept(decide(0.5, UIDS))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_equal_draws_go_by_uid(monkeypatch, fraction):
    def coarse(seed, step, uids):
        return np.array([0.5 if uid < "c" else 0.25 for uid in uids])

    monkeypatch.setattr(random_subset, "uniform", coarse)
    uids = ["d", "b", "a", "c"]
    assert kept(decide(fraction, uids, cuts=(1, 2))) == set("cdab"[: int(4 * fraction)])


def test_two_seeds_with_one_combined():
    """What one seed left in the combined measures does not answer for another."""
    selector = RandomSubset(fraction=0.3)
    part = pa.table({"uid": UIDS})
    combined = selector.combine([selector.measure(part)])
    for seed in (0, 2, 0):
        reasons = dict(zip(UIDS, selector.apply(part, combined, seed).to_pylist(), strict=True))
        assert reasons == decide(0.3, UIDS, seed=seed)


def test_an_empty_pool():
    assert decide(0.3, []) == {}


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_that_is_none(fraction):
    with pytest.raises(ValueError, match=rf"fraction {fraction} is outside"):
        RandomSubset(fraction=fraction)
