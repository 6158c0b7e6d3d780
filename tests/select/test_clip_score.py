import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.select.clip_score import ClipScore


def decide(selector, rows, cuts=()):
    table = pa.table(
        {
            "uid": pa.array([uid for uid, _ in rows], pa.string()),
            "clip_score": pa.array([score for _, score in rows], pa.float32(), from_pandas=False),
        }
    )
    bounds = [0, *cuts, len(rows)]
    parts = [table.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
    combined = selector.combine([selector.measure(p) for p in parts])
    found = {}
    for p in parts:
        answer = selector.apply(p, combined, 0)
        assert answer.type == pa.string()
        found.update(zip(p["uid"].to_pylist(), answer.to_pylist(), strict=True))
    return found


ROWS = [
    ("d", 0.25),
    ("a", 0.5),
    ("c", 0.5),
    ("b", 0.5),
    ("e", float("nan")),
    ("f", None),
    ("g", -1.0),
]


@pytest.mark.parametrize(
    ("knobs", "kept"),
    [
        ({"threshold": 0.5}, "abc"),  # inclusive
        ({"threshold": 0.26}, "abc"),
        ({"threshold": -2.0}, "abcdg"),
        ({"fraction": 1.0}, "abcdg"),
        ({"fraction": 0.8}, "abcd"),
        ({"fraction": 0.4}, "ab"),  # int(5 * 0.4) = 2 of three equal ones: the smallest uids
        ({"fraction": 0.39}, "a"),
        ({"fraction": 0.1}, ""),
        ({"fraction": 0.0}, ""),
    ],
)
def test_keeps(knobs, kept):
    expected = {uid: None if uid in kept else "clip_score" for uid, _ in ROWS}
    expected |= {"e": "nan", "f": "missing_score"}
    assert decide(ClipScore(**knobs), ROWS) == expected
    assert decide(ClipScore(**knobs), ROWS[::-1], cuts=(0, 2, 3)) == expected


def test_fraction_equals_a_full_sort():
    rng = np.random.default_rng(0)
    rows = [(f"{i:04x}", float(s)) for i, s in enumerate(rng.integers(0, 40, 500) / 8)]
    best = sorted(rows, key=lambda row: (-row[1], row[0]))[: int(500 * 0.37)]
    reasons = decide(ClipScore(fraction=0.37), rows, cuts=(100, 350))
    assert {uid for uid, reason in reasons.items() if reason is None} == {uid for uid, _ in best}


@pytest.mark.parametrize("knobs", [{"threshold": 0.3}, {"fraction": 0.3}])
def test_empty_pool(knobs):
    assert decide(ClipScore(**knobs), []) == {}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "threshold=None and fraction=None"),
        ({"threshold": 0.1, "fraction": 0.1}, "exactly one"),
        ({"fraction": 1.2}, r"fraction 1\.2"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        ClipScore(**knobs)
