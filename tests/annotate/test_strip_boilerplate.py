"""Only the end of a caption is stripped, by whole words; what is left keeps its spelling."""

import json
import pickle

import pyarrow as pa
import pytest

from curation.annotate.strip_boilerplate import StripBoilerplate

PHRASES = ["free download", "download", "stock vector (royalty free)", "buy now -50%"]


@pytest.fixture
def annotator(tmp_path):
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(PHRASES))
    return StripBoilerplate(phrases=str(path))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("SUNRISE free download", "SUNRISE"),
        ("sunrise Free  Download ", "sunrise"),
        ("sunrise, buy now -50%", "sunrise"),
        ("Sun, Moon stock vector (royalty free) free download", "Sun, Moon"),
        ("free download of a sunrise", None),  # not at the end
        ("carefree download", "carefree"),  # "download" is a phrase; "free" is half a word
        ("sun mydownload", None),
        ("sunrise", None),
        ("", None),
    ],
)
def test_by_hand(annotator, caption, expected):
    (row,) = annotator.annotate([{"uid": "u", "caption": caption}])
    texts = [entry["text"] for entry in row["captions_stripped"]]
    assert texts == ([] if expected is None else [expected])
    assert row["stripped_refused"] == []


@pytest.mark.parametrize("caption", ["free download", "- free download", "download download"])
def test_nothing_left_is_a_counted_reason(annotator, caption):
    (row,) = annotator.annotate([{"uid": "u", "caption": caption}])
    assert row["captions_stripped"] == []
    assert [entry["reason"] for entry in row["stripped_refused"]] == ["boilerplate_only"]


def test_rows_fit_the_columns_and_none_is_no_caption(annotator):
    samples = [{"uid": str(n), "caption": c} for n, c in enumerate(["a free download", None, "b"])]
    rows = pickle.loads(pickle.dumps(annotator)).annotate(samples)
    table = pa.Table.from_pylist(rows, schema=pa.schema(annotator.columns.items()))
    assert [len(bank) for bank in table["captions_stripped"].to_pylist()] == [1, 0, 0]
    entry = table["captions_stripped"][0].as_py()[0]
    assert entry["role"] == "rewrite" and entry["source"] == "boilerplate" and entry["model"]


def test_an_empty_list_changes_nothing(tmp_path):
    path = tmp_path / "none.json"
    path.write_text("[]")
    annotator = StripBoilerplate(phrases=str(path), bank="other")
    assert annotator.annotate([{"uid": "u", "caption": "a free download"}]) == [
        {"captions_other": [], "other_refused": []}
    ]


def test_banks_have_names_of_their_own(tmp_path):
    path = tmp_path / "none.json"
    path.write_text("[]")
    names = {StripBoilerplate(phrases=str(path), bank=bank).name for bank in ("one", "two")}
    assert len(names) == 2
    with pytest.raises(ValueError, match="bank 'a b'"):
        StripBoilerplate(phrases=str(path), bank="a b")
