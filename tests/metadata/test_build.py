import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.annotate.entries import EntryMatcher, read_entries
from curation.metadata.build import EntryKnobs, build, count_ngrams, write
from curation.metadata.wordnet import extract, lemmas

ROOT = Path(__file__).parents[2]
CAPTIONS = [
    "hot dog, hot  dog (x)",
    "Hot dog\nstand zyx",
    "zyx hot dog zyx",
    "red zyx qqq!",
    "red zyx",
]


def test_wordnet_list():
    words = lemmas()
    assert len(words) == 147_306
    assert words == sorted(set(words))
    assert {"dog", "hot dog", "'s gravenhage", ".22 caliber"} <= set(words)
    assert all(word == word.lower() for word in words)
    assert "Princeton" in (ROOT / "curation/metadata/WORDNET_LICENSE.txt").read_text()


def test_wordnet_extraction(tmp_path):
    for part in ("noun", "verb", "adj", "adv"):
        lines = f"  1 This software and database\nhot_dog n 1 2 @\nbe_{part} v 1\n"
        (tmp_path / f"index.{part}").write_text(lines)
    assert extract(tmp_path) == ["be adj", "be adv", "be noun", "be verb", "hot dog"]


def test_ngrams_by_hand():
    unigrams, bigrams = count_ngrams(CAPTIONS[:3], lower_case=False)
    assert unigrams == Counter({"dog": 4, "hot": 3, "Hot": 1, "stand": 1, "zyx": 3})
    # a comma, two spaces and brackets part words; a line break does not
    pairs = {"hot dog": 2, "Hot dog": 1, "dog stand": 1, "stand zyx": 1, "zyx hot": 1, "dog zyx": 1}
    assert {" ".join(pair): count for pair, count in bigrams.items()} == pairs
    assert count_ngrams(CAPTIONS[:3], lower_case=True)[0]["hot"] == 4


def test_every_ngram_matches_where_it_was_counted():
    unigrams, bigrams = count_ngrams(CAPTIONS, lower_case=False)
    ngrams = [*unigrams, *(" ".join(pair) for pair in bigrams)]
    matched = EntryMatcher(entries=ngrams).match(CAPTIONS)
    assert {i for row in matched for i in row} == set(range(len(ngrams)))


def test_list_by_hand():
    knobs = EntryKnobs(min_unigram_count=2, min_bigram_count=2, min_pmi=0.0, wordnet=False)
    made = build(CAPTIONS, knobs)
    assert made["entries"][:100] == [str(n) for n in range(100)]
    unigrams, bigrams = count_ngrams(CAPTIONS, lower_case=False)
    assert made["entries"][100:104] == ["zyx", "dog", "hot", "red"]  # 5, 5 -> by count, then name
    pmi = {
        " ".join(pair): math.log2(n * unigrams.total() / (unigrams[pair[0]] * unigrams[pair[1]]))
        for pair, n in bigrams.items()
        if n >= 2
    }
    assert made["entries"][104:] == sorted(pmi, key=lambda pair: (-pmi[pair], pair))
    assert made["sources"] == {"numbers": 100, "wordnet": 0, "unigrams": 4, "bigrams": len(pmi)}
    strict = EntryKnobs(min_unigram_count=2, min_bigram_count=2, min_pmi=99.0, wordnet=False)
    assert build(CAPTIONS, strict)["sources"]["bigrams"] == 0


def test_no_entry_twice_and_the_order_of_captions_does_not_matter(tmp_path):
    knobs = EntryKnobs(min_unigram_count=1, min_bigram_count=1, min_pmi=-9.0)
    made, again = build(CAPTIONS, knobs), build(CAPTIONS[::-1], knobs)
    assert made == again
    assert len(set(made["entries"])) == len(made["entries"]) == sum(made["sources"].values())
    compact = json.dumps(made["entries"], ensure_ascii=False, separators=(",", ":"))
    assert made["sha256"] == hashlib.sha256(compact.encode()).hexdigest()
    write(made, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == made
    assert read_entries(tmp_path / "a.json") == made["entries"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_too_long_words_and_bad_knobs():
    knobs = EntryKnobs(min_unigram_count=1, wordnet=False)
    assert build(["x" * 257, "y" * 256], knobs)["sources"]["unigrams"] == 1
    with pytest.raises(ValueError, match="min_bigram_count 0"):
        EntryKnobs(min_bigram_count=0)


def test_command(tmp_path):
    pq.write_table(pa.table({"text": [*CAPTIONS, None]}), tmp_path / "a.parquet")
    command = [
        sys.executable,
        "-m",
        "curation.metadata.build",
        "--captions",
        tmp_path / "a.parquet",
    ]
    command += ["--output", tmp_path / "e.json", "--no-wordnet", "--min-unigram-count", "2"]
    run = lambda *more: subprocess.run(  # noqa: E731
        [*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "has no column 'caption'" in run().stderr
    done = run("--column", "text")
    assert done.returncode == 0, done.stderr
    assert "104 entries" in done.stdout
    assert len(read_entries(tmp_path / "e.json")) == 104
