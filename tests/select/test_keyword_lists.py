"""What is a list of keywords and what is a name."""

import pyarrow as pa
import pytest

from curation.select.keyword_lists import KeywordLists, is_keyword_list


@pytest.mark.parametrize(
    "caption",
    [
        "animal, wise, bird, owl",
        "tool,spanner",
        "8:30, eight-thirty, clock",
        "red car; road; sky",
        "猫、動物",
    ],
)
def test_lists(caption):
    assert is_keyword_list(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "red apple",
        "woman: medium skin tone, red hair",
        "flag: St. Kitts & Nevis",
        "a man, a plan, a canal of great length",
        "Paris, ",
        ",",
        "",
        "a dog running on the beach, sunny day",
    ],
)
def test_names_and_sentences(caption):
    assert not is_keyword_list(caption)


def test_the_knob_and_the_reason():
    part = pa.table({"uid": ["a", "b"], "caption": ["old red car, road", "car, road"]})
    assert KeywordLists().apply(part, None, 0).to_pylist() == [None, "keyword_list"]
    assert (
        KeywordLists(max_words_per_item=3).apply(part, None, 0).to_pylist() == ["keyword_list"] * 2
    )
    with pytest.raises(ValueError, match="max_words_per_item 0"):
        KeywordLists(max_words_per_item=0)
