import itertools
import math
import random

import pyarrow as pa
import pytest

from curation.annotate.text_spotting import TextSpotting
from curation.select.parrot import (
    Parrot,
    co_embedded_text_rates,
    concurrent_word_rate,
    longest_fuzzy_match,
    word_list,
)
from curation.step import Scoring
from pipeline.check import composed
from pipeline.config import build, problems

PRESETS = {
    "parrot": {},
    "parrot_rate": {"max_concurrent_rate": 0.4},
    "parrot_no_text": {"max_text_area_fraction": 0.0},
    "parrot_text_debiased": {"max_text_area_fraction": 0.0, "above": {"clip_score": 0.3}},
    "parrot_text_debiased_aesthetic": {
        "max_text_area_fraction": 0.0,
        "above": {"clip_score": 0.3, "aesthetic": 4.5},
    },
}


def preset(name):
    cfg = composed("curate", ["pool=p", "out=o", f"+select@select.parrot={name}", "order=[parrot]"])
    assert problems(cfg) == []
    return build(cfg.select.parrot)


@pytest.mark.parametrize(
    ("caption", "spotted", "rate"),
    [
        ("SOS button", ["SOS"], 0.5),
        ("sos BUTTON", ["Sos", "button!"], 1.0),
        ("sos sos sos button", ["SOS"], 0.5),  # distinct words
        ("no smoking sign", ["NO SMOKING"], 2 / 3),  # a region may hold several words
        ("no smoking sign", ["NO", "SMOKING"], 2 / 3),
        ("new", ["newer"], 0.0),  # whole words
        ("Straße_frei", ["STRASSE"], 0.5),
        ("ＳＯＳ ボタン", ["SOS"], 1 / 4),  # full width letters; a kana is a word
        ("禁止吸烟", ["禁止"], 0.5),  # no spaces: a Han character is a word
        ("禁止吸烟", ["禁止吸烟"], 1.0),
        ("cafe\u0301 noir", ["CAFÉ"], 0.5),  # composed and decomposed
        ("हिन्दी में", ["हिन्दी"], 0.5),  # vowel signs do not cut a word
        ("금연 구역", ["금연"], 0.5),  # Korean has spaces
        ("a red apple", [], 0.0),
        ("!!!", ["SOS"], 0.0),
        ("", ["SOS"], 0.0),
    ],
)
def test_rate_by_hand(caption, spotted, rate):
    assert concurrent_word_rate(caption, spotted) == rate


def test_words():
    assert word_list("It's 3.5 km—soft\u00adhyphen") == ["it", "s", "3", "5", "km", "softhyphen"]
    assert word_list("出口Exit出口") == ["出", "口", "exit", "出", "口"]
    assert word_list("𠮷野") == ["𠮷", "野"]


@pytest.mark.parametrize(
    ("caption", "spotted", "longest"),
    [
        ("the no smoking sign", ["NO", "SMOKING"], 2),
        ("the no smoking sign", ["SMOKING", "NO"], 2),  # wherever they are
        ("the no smoking sign", ["NO", "SM0KING"], 2),  # 1 of 7 letters misread
        ("the no smoking sign", ["N0", "SMOKING"], 1),  # 1 of 2 is too much
        ("new shoes and new bags", ["new", "bags", "shoes"], 2),
        ("new shoes new bags", ["new", "bags", "shoes"], 4),
        ("禁止吸烟标志", ["禁止 吸烟"], 4),
        ("apples", ["appls"], 1),
        ("", ["new"], 0),
        ("new", [], 0),
        ("!!", ["!!"], 0),
    ],
)
def test_longest_match_by_hand(caption, spotted, longest):
    assert longest_fuzzy_match(caption, spotted) == longest


def edits(a, b):
    """Levenshtein distance, the textbook table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_longest_match_against_every_run():
    rng = random.Random(0)
    vocabulary = ["".join(p) for n in (2, 4) for p in itertools.product("ab", repeat=n)]
    found = set()
    for _ in range(300):
        caption = rng.choices(vocabulary, k=rng.randint(0, 8))
        spotted = rng.choices(vocabulary, k=rng.randint(0, 4))

        def close(word, spotted=spotted):
            return any(1 - edits(word, s) / max(len(word), len(s)) >= 0.75 for s in spotted)

        expected = max(
            (
                stop - start
                for start in range(len(caption))
                for stop in range(start + 1, len(caption) + 1)
                if all(map(close, caption[start:stop]))
            ),
            default=0,
        )
        got = longest_fuzzy_match(" ".join(caption), spotted, min_similarity=0.75)
        assert got == expected, (caption, spotted)
        found.add(expected)
    assert len(found) > 4  # the cases differ


def test_rates_of_a_dataset_against_a_count():
    pairs = [
        ("SOS button", ["SOS"]),  # 1 of 2, and "buton" is not there
        ("no smoking sign", ["NO", "SM0KING"]),  # 1 of 3, 2 of 3 fuzzily
        ("a red apple", ["SALE"]),  # 0 of 3
        ("a green apple tree", []),  # 4 words, no text
        ("", ["SOS"]),
    ]
    assert co_embedded_text_rates(iter(pairs)) == {
        "pairs": 5,
        "image_text_rate": 4 / 5,
        "concurrent_pair_rate": 2 / 5,
        "co_embedded_text_rate": 2 / 12,
        "co_embedded_text_rate_with_text": 2 / 8,
        "fuzzy_co_embedded_text_rate": 3 / 12,
    }
    assert set(co_embedded_text_rates([]).values()) == {0}


ROWS = [  # caption, spotted (text, confidence) or None: unread, clip score, aesthetic score
    ("SOS", [("SOS", 0.9)], 0.4, 5.0),
    ("SOS button", [("SOS", 0.9)], 0.4, 5.0),
    ("SOS button", [("SOS", 0.6)], 0.4, 5.0),
    ("no smoking sign", [("NO", 0.9), ("SMOKING", 0.8)], 0.2, 5.0),
    ("a red apple", [("SOS", 0.9)], 0.4, 5.0),
    ("SOS", None, 0.4, 5.0),
    ("SOS", [], 0.4, 5.0),
    ("apple", [], 0.3, 5.0),  # not above 0.3
    ("apple", [], 0.31, 4.5),  # not above 4.5
    ("apple", [], math.nan, 5.0),
    ("apple", [], None, 4.0),
    ("", [], 0.31, 4.6),
]


def table(rows=ROWS):
    def region(text, confidence):
        box = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.2}
        return {"text": text, "confidence": confidence, "area_fraction": 0.1, **box}

    spotted = [[region(*r) for r in regions or []] for _, regions, _, _ in rows]
    area = [None if r is None else 0.1 * len(r) for _, r, _, _ in rows]
    error = ["engine_RuntimeError" if r is None else None for _, r, _, _ in rows]
    kinds = TextSpotting.columns
    return pa.table(
        {
            "uid": [f"{i:032x}" for i in range(len(rows))],
            "caption": pa.array([row[0] for row in rows], pa.string()),
            "spotted_text": pa.array(spotted, kinds["spotted_text"]),
            "text_area_fraction": pa.array(area, kinds["text_area_fraction"]),
            "text_spotting_error": pa.array(error, kinds["text_spotting_error"]),
            "clip_score": pa.array([row[2] for row in rows], pa.float64()),
            "aesthetic": pa.array([row[3] for row in rows], pa.float64()),
        }
    )


def reasons(selector, part):
    part = part.select(["uid", *selector.reads])
    combined = selector.combine([selector.measure(part)])
    return selector.apply(part, combined, 0).to_pylist()


@pytest.mark.parametrize(
    ("knobs", "dropped"),
    [
        ({}, []),
        ({"max_concurrent_rate": 1.0}, []),
        ({"max_concurrent_rate": 0.5}, [0, 3]),
        ({"max_concurrent_rate": 0.4}, [0, 1, 2, 3]),
        ({"max_concurrent_rate": 0.4, "min_confidence": 0.8}, [0, 1, 3]),
        ({"max_concurrent_rate": 0.4, "min_confidence": 0.85}, [0, 1]),  # 1 of 3 words is left
        ({"max_concurrent_rate": 0.4, "min_concurrent_words": 2}, [3]),
        ({"max_concurrent_rate": 0.0}, [0, 1, 2, 3]),
    ],
)
def test_drops_by_rate(knobs, dropped):
    expected = ["parrot" if i in dropped else None for i in range(len(ROWS))]
    assert reasons(Parrot(**knobs), table()) == expected


def brute_force(knobs, row):
    """The four predicates of the released subset, and ours, one pair at a time."""
    caption, regions, clip_score, aesthetic = row
    if "max_text_area_fraction" in knobs:
        if regions is None:
            return "unread_image"
        if regions:
            return "text"
    for column, value in (("clip_score", clip_score), ("aesthetic", aesthetic)):
        bound = knobs.get("above", {}).get(column)
        if bound is not None and not (value is not None and value > bound):
            return f"low_{column}"
    if "max_concurrent_rate" in knobs and regions and caption:
        mine = set(caption.lower().split())
        there = {text.lower() for text, confidence in regions if confidence >= 0.5}
        if len(mine & there) / len(mine) > knobs["max_concurrent_rate"]:
            return "parrot"
    return None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_drop_for_the_right_reasons(name):
    expected = [brute_force(PRESETS[name], row) for row in ROWS]
    assert reasons(preset(name), table()) == expected
    # whatever the parts
    parts = [reasons(preset(name), table().slice(start, 5)) for start in (0, 5, 10)]
    assert [reason for part in parts for reason in part] == expected
    assert (set(expected) == {None}) == (name == "parrot")


def test_all_rules_together_take_the_first_reason():
    knobs = {"max_concurrent_rate": 0.4, "above": {"clip_score": 0.3, "aesthetic": 4.5}}
    got = reasons(Parrot(**knobs), table())
    assert got == [brute_force(knobs, row) for row in ROWS]
    assert set(got) == {None, "parrot", "low_clip_score", "low_aesthetic"}
    assert got[3] == "low_clip_score"
    assert got[10] == "low_clip_score"


def test_scores_and_keeps_by_default():
    selector = Parrot()
    assert isinstance(selector, Scoring)
    part = table().select(["uid", *selector.reads])
    assert selector.apply(part, None, 0).null_count == len(ROWS)
    scores = selector.score(part, None, 0)
    assert {name: array.type for name, array in scores.items()} == dict(Parrot.columns)
    rate = scores["concurrent_word_rate"].to_pylist()
    assert rate[:3] == [1.0, 0.5, 0.5]
    assert rate[3] == pytest.approx(2 / 3)
    assert rate[4:7] == [0.0, None, 0.0]  # unread: not known
    longest = scores["longest_fuzzy_match"].to_pylist()
    assert longest[:7] == [1.0, 1.0, 1.0, 2.0, 0.0, None, 0.0]
    sure = Parrot(min_confidence=0.7).score(part, None, 0)["concurrent_word_rate"].to_pylist()
    assert sure[:3] == [1.0, 0.5, 0.0]


def test_null_captions_and_no_rows():
    part = table([(None, [("SOS", 0.9)], 0.4, 5.0)])
    assert reasons(Parrot(max_concurrent_rate=0.0), part) == [None]
    assert Parrot().score(part, None, 0)["concurrent_word_rate"].to_pylist() == [0.0]
    knobs = {"max_text_area_fraction": 0.0, "above": {"clip_score": 0.3}}
    assert reasons(Parrot(max_concurrent_rate=0.1, **knobs), part.slice(0, 0)) == []
    assert len(Parrot().score(part.slice(0, 0), None, 0)["longest_fuzzy_match"]) == 0


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_concurrent_rate": 1.1},
        {"max_concurrent_rate": 0.5, "min_concurrent_words": 0},
        {"max_text_area_fraction": -0.1},
        {"min_similarity": 2},
        {"above": {"clip_score": math.nan}},
        {"max_concurrent_rate": 0.5, "min_confidence": -1},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=next(reversed(knobs))):
        Parrot(**knobs)
