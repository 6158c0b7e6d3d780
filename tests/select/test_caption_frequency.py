"""ALIGN's rule against a brute force."""

import pyarrow as pa
import pytest

from curation.select.caption_frequency import CaptionFrequency, spoken

CAPTIONS = [
    "Untitled",
    "untitled.",
    "a red apple",
    "UNTITLED!",
    "A red apple",
    "日本",
    "★",
    "★ ",
    "★",
]


def decide(selector, captions, cuts):
    parts = [pa.table({"uid": c, "caption": c}) for c in (captions[a:b] for a, b in cuts)]
    combined = selector.combine([selector.measure(part) for part in parts])
    return [reason for part in parts for reason in selector.apply(part, combined, 0).to_pylist()]


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("cuts", [[(0, 9)], [(0, 4), (4, 4), (4, 9)]])
def test_brute_force(most, cuts):
    expected = [
        "frequent_caption" if sum(spoken(o) == spoken(c) for o in CAPTIONS) > most else None
        for c in CAPTIONS
    ]
    assert decide(CaptionFrequency(max_pairs_per_caption=most), CAPTIONS, cuts) == expected


def test_case_and_punctuation_do_not_hide_a_caption():
    assert spoken("Stock photo, (royalty-free)!") == spoken("stock PHOTO royalty free")
    assert spoken(" ★ ") == "★"


def test_a_limit_below_one_is_named():
    with pytest.raises(ValueError, match="max_pairs_per_caption 0"):
        CaptionFrequency(max_pairs_per_caption=0)
