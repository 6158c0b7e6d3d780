"""Boilerplate is told from attributes by what stands before it, and by standing alone."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.metadata.boilerplate import BoilerplateKnobs, find, read_phrases

NOUNS = [f"{first}{second}" for first in "abcdefgh" for second in "stuvwxyz"]  # 64 words


def pool() -> list[str]:
    captions = [f"{noun}" for noun in NOUNS]
    captions += [f"{noun.upper()} Free  download" for noun in NOUNS]
    captions += ["free download", "FREE DOWNLOAD"]
    captions += [f"{noun}: dark skin tone" for noun in NOUNS] + ["dark skin tone"] * 3
    captions += [f"{noun} best price shipping" for noun in NOUNS] + ["best price shipping"] * 2
    captions += [f"{noun} with a hat" for noun in NOUNS]  # complete beginnings, never alone
    return captions


def phrases(captions, **knobs):
    return [p["phrase"] for p in find(captions, BoilerplateKnobs(**knobs))["phrases"]]


def test_finds_what_follows_complete_captions_and_stands_alone():
    assert phrases(pool()) == ["best price shipping", "free download"]


def test_evidence_by_hand():
    entry = find(pool())["phrases"][1]
    assert entry == {"phrase": "free download", "beginnings": 64, "alone": 2, "complete": 1.0}


def test_each_condition_is_needed():
    assert phrases(pool(), min_beginnings=65) == []
    assert phrases(pool(), min_alone=3) == []
    assert "dark skin tone" in phrases(pool(), min_complete=0.0)
    only = [c for c in pool() if c not in NOUNS]  # no complete beginnings
    assert phrases(only) == []


def test_order_of_captions_changes_nothing():
    assert find(pool()) == find(list(reversed(pool())))


def test_the_sample_pool(root):
    captions = []
    for file in sorted((root / "examples/emoji/pool").glob("*.parquet")):
        captions += pq.read_table(file, columns=["caption"])["caption"].to_pylist()
    assert set(phrases(captions)) == {
        "best price shipping worldwide",
        "free download",
        "stock vector (royalty free)",
        "image of the day",
        "click here",
        "hd wallpaper",
        "buy now -50%",
    }


def test_command(tmp_path, root):
    table = pa.table({"caption": [*pool(), None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    out = tmp_path / "list.json"
    command = [sys.executable, "-m", "curation.metadata.boilerplate"]
    command += ["--captions", str(tmp_path / "rows.parquet"), "--output", str(out)]
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    assert read_phrases(out) == ["best price shipping", "free download"]
    assert json.loads(out.read_text())["knobs"]["min_beginnings"] == 50


@pytest.mark.parametrize("knob", ["min_beginnings", "min_alone"])
def test_bad_knobs_are_named(knob):
    with pytest.raises(ValueError, match=knob):
        BoilerplateKnobs(**{knob: 0})
    with pytest.raises(ValueError, match="min_complete"):
        BoilerplateKnobs(min_complete=1.1)


def test_bad_lists_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"curation\.metadata\.boilerplate"):
        read_phrases(tmp_path / "none.json")
    path = tmp_path / "list.json"
    path.write_text('["fine", " "]')
    with pytest.raises(ValueError, match="empty"):
        read_phrases(path)
    path.write_text('{"entries": []}')
    with pytest.raises(ValueError, match="phrases"):
        read_phrases(path)
