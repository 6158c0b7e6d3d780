import itertools
from collections import Counter

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


def datacomp(rows, *, fraction=None, threshold=None):
    """uids that baselines/apply_filter.py keeps: numpy sorts NaN last and no NaN is >= anything."""
    scores = np.array([np.nan if s is None else s for _, s in rows], np.float32)
    if threshold is None:
        threshold = -np.sort(-scores)[int(len(rows) * fraction)]
    return {
        uid for (uid, _), kept in zip(rows, scores >= np.float32(threshold), strict=True) if kept
    }


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.5, 0.799])
def test_datacomp_rule_keeps_what_its_code_keeps(fraction):
    """A tenth NaN, a tenth null, many ties."""
    rng = np.random.default_rng(1)
    scores = [float(s) for s in rng.integers(0, 90, 1000) / 64]
    for i in range(0, 1000, 10):
        scores[i], scores[i + 3] = float("nan"), None
    rows = [(f"{i:04x}", score) for i, score in enumerate(scores)]
    reasons = decide(ClipScore(fraction=fraction, rule="datacomp"), rows, cuts=(1, 400))
    kept = {uid for uid, reason in reasons.items() if reason is None}
    assert kept == datacomp(rows, fraction=fraction)
    assert len(kept) > int(1000 * fraction)  # one more, and ties
    assert Counter(reasons.values())["nan"] == Counter(reasons.values())["missing_score"] == 100


def test_datacomp_rule_without_ties_keeps_one_more():
    rows = [(f"{i:04x}", i / 1024) for i in range(1000)]
    for rule, number in (("exact", 300), ("datacomp", 301)):
        reasons = decide(ClipScore(fraction=0.3, rule=rule), rows)
        assert list(reasons.values()).count(None) == number


def test_datacomp_rule_where_its_code_fails():
    assert decide(ClipScore(fraction=1.0, rule="datacomp"), ROWS) == decide(
        ClipScore(fraction=1.0), ROWS
    )
    with pytest.raises(IndexError):
        datacomp(ROWS, fraction=1.0)
    # 5 of 7 have a score: the 6th highest is NaN there, and nothing reaches it
    assert datacomp(ROWS, fraction=0.8) == set()
    reasons = decide(ClipScore(fraction=0.8, rule="datacomp"), ROWS)
    assert {uid for uid, reason in reasons.items() if reason is None} == set("abcdg")


@pytest.mark.parametrize("threshold", [0.3, 0.28, 0.26, 0.25])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_a_score_on_the_threshold_stays(threshold, kind):
    """float32(0.26) is below 0.26 and float32(0.3) above it: what was written as equal is equal."""
    dtype = kind.to_pandas_dtype()
    on = dtype(threshold)
    scores = [np.nextafter(on, dtype(-1)), on, np.nextafter(on, dtype(1))]
    table = pa.table({"uid": list("abc"), "clip_score": pa.array(np.array(scores), kind)})
    selector = ClipScore(threshold=threshold)
    combined = selector.combine([selector.measure(table)])
    assert selector.apply(table, combined, 0).to_pylist() == ["clip_score", None, None]


@pytest.mark.parametrize("threshold", [0.26, 0.5, -1.0])
def test_threshold_keeps_what_datacomp_keeps(threshold):
    rng = np.random.default_rng(2)
    rows = [(f"{i:04x}", float(s)) for i, s in enumerate(rng.choice([0.26, 0.5, 0.1, np.nan], 300))]
    reasons = decide(ClipScore(threshold=threshold), rows)
    kept = {uid for uid, reason in reasons.items() if reason is None}
    assert kept == datacomp(rows, threshold=threshold)


@pytest.mark.parametrize(
    "knobs", [{"threshold": 0.3}, {"fraction": 0.3}, {"fraction": 0.3, "rule": "datacomp"}]
)
def test_empty_pool(knobs):
    assert decide(ClipScore(**knobs), []) == {}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "threshold=None and fraction=None"),
        ({"threshold": 0.1, "fraction": 0.1}, "exactly one"),
        ({"fraction": 1.2}, r"fraction 1\.2"),
        ({"threshold": float("nan")}, "NaN"),
        ({"fraction": 0.3, "rule": "DataComp"}, "use exact or datacomp"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        ClipScore(**knobs)
