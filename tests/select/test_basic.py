import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.select.basic import Basic

OFF = {"languages": None, "min_words": None, "min_characters": None}
OFF |= {"min_side": None, "max_aspect_ratio": None}
GOOD = {
    "caption": "a red dog",
    "width": 200,
    "height": 600,
    "language": "en",
    "language_score": 0.5,
}


def table(rows):
    kinds = {
        "uid": pa.string(),
        "caption": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "language": pa.string(),
        "language_score": pa.float32(),
    }
    rows = [{"uid": f"{i:08x}", **GOOD, **row} for i, row in enumerate(rows)]
    return pa.Table.from_pylist(rows, schema=pa.schema(kinds.items()))


def decide(selector, rows, cuts=()):
    whole = table(rows).select(["uid", *selector.reads])  # it sees what it asked for
    parts = [whole.slice(a, b - a) for a, b in itertools.pairwise([0, *cuts, len(rows)])]
    combined = selector.combine([selector.measure(part) for part in parts])
    answers = [selector.apply(part, combined, 0) for part in parts]
    assert {answer.type for answer in answers} == {pa.string()}
    return [reason for answer in answers for reason in answer.to_pylist()]


def datacomp(row):
    """baselines/apply_filter.py, one row of it: all rules must hold."""
    small, large = min(row["width"], row["height"]), max(row["width"], row["height"])
    return (
        row["language"] == "en"
        and len(row["caption"].split()) > 2
        and len(row["caption"]) > 5
        and small >= 200
        and (large / small if small else np.inf) <= 3.0
    )


def test_keeps_what_datacomp_keeps():
    rng = np.random.default_rng(0)
    words = [
        "a",
        "dog",
        "in\tthe",
        "\n",
        "two\nlines",
        "一只猫",
        "猫",
        "\u3000",
        "\u00a0",
        "é",
        "  ",
    ]
    rows = [
        {
            "caption": " ".join(rng.choice(words, rng.integers(0, 7))),
            "width": int(rng.choice([0, 1, 199, 200, 201, 600, 601, 2000])),
            "height": int(rng.choice([0, 1, 199, 200, 201, 600, 601, 2000])),
            "language": rng.choice(["en", "de", "other", None], p=[0.8, 0.1, 0.05, 0.05]),
        }
        for _ in range(20_000)
    ]
    found = decide(Basic(), rows, cuts=(0, 7, 9_000))
    expected = [datacomp(GOOD | row) for row in rows]
    assert [reason is None for reason in found] == expected
    assert 300 < sum(expected) < 5_000
    assert set(found) == {
        None,
        "language",
        "few_words",
        "short_caption",
        "small_image",
        "aspect_ratio",
    }


@pytest.mark.parametrize(
    ("knobs", "row", "reason"),
    [
        ({"languages": ["en"]}, {"language": "de"}, "language"),
        ({"languages": ["en", "de"]}, {"language": "de"}, None),
        ({"languages": ["en"]}, {"language": None}, "language"),
        ({"languages": ["other"]}, {"language": "other"}, None),
        ({"min_language_score": 0.5}, {"language_score": 0.5}, None),
        ({"min_language_score": 0.5}, {"language_score": 0.4999}, "language_score"),
        ({"min_language_score": 0.0}, {"language_score": None}, "language_score"),
        ({"min_language_score": 0.0}, {"language_score": float("nan")}, "language_score"),
        ({"min_words": 3}, {"caption": "one\ntwo\u3000three"}, None),
        ({"min_words": 3}, {"caption": "一只猫坐在草地上"}, "few_words"),
        ({"min_words": 1}, {"caption": " \n"}, "few_words"),
        ({"min_characters": 6}, {"caption": "12345\n"}, None),
        ({"min_characters": 6}, {"caption": "12345"}, "short_caption"),
        ({"min_characters": 2}, {"caption": "猫"}, "short_caption"),
        ({"max_characters": 9}, {"caption": "123456789"}, None),
        ({"max_characters": 9}, {"caption": "1234567890"}, "long_caption"),
        ({"min_side": 200}, {"height": 199}, "small_image"),
        ({"min_side": 200}, {"width": 5000, "height": 200}, None),
        ({"max_aspect_ratio": 3.0}, {"width": 1, "height": 3}, None),
        ({"max_aspect_ratio": 3.0}, {"width": 100, "height": 301}, "aspect_ratio"),
        ({"max_aspect_ratio": 3.0}, {"width": 0, "height": 0}, "aspect_ratio"),
        ({}, {"caption": "", "width": 1, "language": None, "language_score": None}, None),
    ],
)
def test_each_rule_alone_at_its_bound(knobs, row, reason):
    assert decide(Basic(**(OFF | knobs)), [row]) == [reason]


def test_the_first_broken_rule_is_the_reason():
    worst = {"caption": "x", "width": 1, "language": "de", "language_score": 0.0}
    order = []
    knobs = {"min_language_score": 0.1, "max_characters": 0}
    for off in ("languages", "min_language_score", "min_words", "min_characters", "max_characters"):
        order += decide(Basic(**knobs), [worst])
        knobs[off] = None
    order += decide(Basic(**knobs), [worst])
    order += decide(Basic(**knobs, min_side=None), [worst])
    assert order == [
        "language",
        "language_score",
        "few_words",
        "short_caption",
        "long_caption",
        "small_image",
        "aspect_ratio",
    ]


def test_reads_only_what_it_looks_at():
    assert "language" not in Basic(languages=None).reads
    assert "language_score" in Basic(min_language_score=0.2).reads
    assert decide(Basic(), []) == []


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"languages": "en"}, "need a list"),
        ({"languages": []}, "need a list"),
        ({"min_language_score": 1.1}, "min_language_score 1.1"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio 0.5"),
        ({"min_words": -1}, "min_words -1"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Basic(**knobs)
