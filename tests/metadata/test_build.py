import bz2
import gzip
import hashlib
import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.annotate.entries import EntryMatcher, read_entries
from curation.metadata.build import (
    WikipediaFiles,
    build,
    read_lemmas,
    write,
)
from curation.metadata.knobs import WIKIPEDIA, EntryKnobs, WikipediaKnobs
from curation.metadata.ngrams import SpillingCounter, associated_bigrams, count_ngrams
from curation.metadata.wikipedia import page_views, paragraphs
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
    assert dict(bigrams.items()) == pairs
    assert count_ngrams(CAPTIONS[:3], lower_case=True)[0]["hot"] == 4


def test_every_ngram_matches_where_it_was_counted():
    unigrams, bigrams = count_ngrams(CAPTIONS, lower_case=False)
    ngrams = [*unigrams, *(pair for pair, _ in bigrams.items())]
    matched = EntryMatcher(entries=ngrams).match(CAPTIONS)
    assert {i for row in matched for i in row} == set(range(len(ngrams)))


def test_list_by_hand():
    knobs = EntryKnobs(min_unigram_count=2, min_bigram_count=2, min_pmi=0.0, wordnet=False)
    made = build(CAPTIONS, knobs)
    assert made["entries"][:100] == [str(n) for n in range(100)]
    unigrams, bigrams = count_ngrams(CAPTIONS, lower_case=False)
    assert made["entries"][100:104] == ["zyx", "dog", "hot", "red"]  # 5, 5 -> by count, then name
    pmi = {}
    for pair, count in bigrams.items():
        first, second = pair.split()
        if count >= 2:
            chance = Fraction(unigrams[first] * unigrams[second], unigrams.total())
            pmi[pair] = count / chance
    assert made["entries"][104:] == sorted(pmi, key=lambda pair: (-pmi[pair], pair))
    assert made["sources"] == {"numbers": 100, "wordnet": 0, "unigrams": 4, "bigrams": len(pmi)}
    for min_pmi in (0.5, 1.0, 99.0):
        strict = EntryKnobs(min_unigram_count=2, min_bigram_count=2, min_pmi=min_pmi, wordnet=False)
        left = sum(math.log2(value) >= min_pmi for value in pmi.values())
        assert build(CAPTIONS, strict)["sources"]["bigrams"] == left


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


def test_words_may_end_with_combining_marks():
    words = ["की", "ก็", "dog", "'s", "犬", "x."]
    assert set(count_ngrams([" ".join(words)])[0]) == {"की", "ก็", "dog", "犬", "x"}


@pytest.mark.parametrize("max_keys", [1, 3, 1000])
def test_counts_on_disk_are_the_counts_in_memory(max_keys):
    rng = random.Random(0)
    keys = rng.choices(["a b", "a", "é", "\x0b", "\u2028", "z\ty", "犬", ""], k=400)
    counter = SpillingCounter(max_keys=max_keys)
    for start in range(0, 400, 7):
        counter.update(keys[start : start + 7])
    found = list(counter.items())
    assert found == sorted(Counter(keys).items())
    assert list(counter.items()) == found


def test_any_memory_gives_the_same_list(monkeypatch):
    rng = random.Random(1)
    captions = [" ".join(rng.choices("abcdefg", k=6)) for _ in range(200)]
    unigrams, bigrams = count_ngrams(captions)
    _, spilled = count_ngrams(captions, max_pairs=10)
    assert len(spilled._files) > 5
    first, second = (
        associated_bigrams(unigrams, counts, min_count=3, min_pmi=-1.0)
        for counts in (bigrams, spilled)
    )
    assert first == second and len(first) > 20


PAGES = """en Hot_dog 60 0
en Hot_dog 49 0
en.m Hot_dog 60 0
en Zoo 69 0
en File:Zoo.jpg 900 0
de Hund 900 0
en Zyx_zoo 70 0
en broken line here 1
en ! 1000 0
"""


@pytest.fixture
def wikipedia(tmp_path):
    plain = tmp_path / "wiki_00"
    plain.write_text('<doc id="1" title="x">\nred zyx <b>red</b> zyx\n\nqqq one\n</doc>\n' * 2)
    as_json = tmp_path / "wiki_01.gz"
    with gzip.open(as_json, "wt") as file:
        file.write("\n".join(json.dumps({"text": "red zyx\nred qqq"}) for _ in range(2)) + "\n")
    views = tmp_path / "pageviews.bz2"
    with bz2.open(views, "wt") as file:
        file.write(PAGES)
    return {"text": [plain, as_json], "page_views": [views]}


def test_wikipedia_by_hand(wikipedia):
    # red: 2 * 2 + 2 * 2 = 8, zyx 6, qqq 4, one 2: 20 words
    # red zyx 4 (the tags leave more than a space) with 4 * 20 / (8 * 6), red qqq 2, qqq one 2
    knobs = WikipediaKnobs(min_unigram_count=4, min_pmi=0.5, min_bigram_count=2)
    made = build(
        ["own words own words"],
        EntryKnobs(wordnet=False, min_unigram_count=2, min_bigram_count=2, min_pmi=0.0),
        wikipedia=WikipediaFiles(**wikipedia, knobs=knobs),
    )
    assert made["entries"][100:] == [
        *["red", "zyx", "qqq"],
        *["qqq one", "red zyx"],  # 2 * 20 / (4 * 2) = 5 and 5 / 3; red qqq has 5 / 4, no 0.5 bits
        *["Zyx zoo"],  # 70 views, Hot dog 60 on one page, Zoo 69
        *["own", "words", "own words"],
    ]
    assert made["sources"] == {
        "numbers": 100,
        "wordnet": 0,
        "wikipedia_unigrams": 3,
        "wikipedia_bigrams": 2,
        "wikipedia_titles": 1,
        "unigrams": 2,
        "bigrams": 1,
    }
    assert made["knobs"]["wikipedia"]["min_pmi"] == 0.5


def test_the_values_of_metaclip_2(wikipedia):
    knobs = replace(WIKIPEDIA["metaclip2"], min_pmi=0.0)
    files = WikipediaFiles(**wikipedia, knobs=knobs)
    made = build([], EntryKnobs(wordnet=False, lower_case=True), wikipedia=files)
    # a tenth of four words is none; 76 % of four titles (one mere punctuation) is three
    assert made["sources"]["wikipedia_unigrams"] == 0
    assert made["sources"]["wikipedia_titles"] == 3
    assert made["entries"][-3:] == ["hot dog", "zyx zoo", "zoo"]  # 169, 70, 69 views
    assert WIKIPEDIA["metaclip2"].min_pmi > 30.0 == WIKIPEDIA["metaclip"].min_pmi


def test_caps_count_new_entries_only(tmp_path):
    words = [f"w{n}" for n in range(10, 50)]
    (tmp_path / "text").write_text(" , ".join(words), encoding="utf-8")
    knobs = replace(WIKIPEDIA["metaclip2"])
    files = WikipediaFiles(text=[tmp_path / "text"], knobs=knobs)
    made = build([], EntryKnobs(wordnet=False), wikipedia=files, more_lemmas=["w10", "w11"])
    assert made["entries"][100:] == ["w10", "w11", "w12", "w13", "w14", "w15"]


def test_the_list_ends_where_it_should():
    made = build(CAPTIONS, EntryKnobs(max_entries=102, min_unigram_count=1))
    assert len(made["entries"]) == 102 == sum(made["sources"].values())
    assert made["entries"][100:] == lemmas()[:2]


def test_languages_without_spaces():
    knobs = EntryKnobs(
        language="th", unspaced=True, wordnet=False, min_unigram_count=2, min_bigram_count=2
    )
    made = build(
        ["犬 小屋", "犬 小屋"], replace(knobs, min_pmi=-1.0), more_lemmas=["猫", "、", " "]
    )
    assert made["entries"][100:] == ["猫", "小屋", "犬", "犬小屋"]
    assert made["language"] == "th"


def test_lemmas_of_other_languages(tmp_path):
    tab = "# Wordnet\tfra\n00001-n\tfra:lemma\tchien_chaud\n00001-n\tfra:def\tun chien\n"
    (tmp_path / "fra.tab").write_text(tab + "00002-n\tfra:lemma\tporte+feuille\n")
    assert read_lemmas(tmp_path / "fra.tab") == ["chien chaud", "portefeuille"]
    (tmp_path / "plain.txt").write_text("zoo\nhot_dog\n\n")
    assert read_lemmas(tmp_path / "plain.txt") == ["hot dog", "zoo"]


def test_bad_wikipedia_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"title": "y"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl line 2.*title"):
        list(paragraphs([tmp_path / "a.jsonl"]))
    with pytest.raises(ValueError, match="b.txt does not exist"):
        list(paragraphs([tmp_path / "b.txt"]))
    (tmp_path / "views").write_text("one\ntwo\nen Dog 3 0\n")
    with pytest.raises(ValueError, match="2 of 3 lines"):
        page_views([tmp_path / "views"], language="en", min_hourly_views=1, mobile=False)
    (tmp_path / "views").write_text("Dog\t3\nCat_fish\t4\n")
    found = page_views([tmp_path / "views"], language="en", min_hourly_views=1, mobile=False)
    assert found == {"Dog": 3, "Cat fish": 4}
    with pytest.raises(ValueError, match="unknown caps 'x'"):
        WikipediaKnobs(caps="x")


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


def test_command_with_wikipedia(tmp_path, wikipedia):
    command = [sys.executable, "-m", "curation.metadata.build", "--output", tmp_path / "de.json"]
    run = lambda *more: subprocess.run(  # noqa: E731
        [*map(str, command), *map(str, more)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "no source" in run("--language", "de").stderr
    more = ["--wikipedia-text", *wikipedia["text"], "--wikipedia-views", *wikipedia["page_views"]]
    done = run(*more, "--language", "de", "--wikipedia-min-unigram-count", "6")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "de.json").read_text(encoding="utf-8"))
    assert made["entries"][100:] == ["red", "zyx", "Hund"]  # no English WordNet
    assert made["knobs"]["wikipedia"]["min_pmi"] == 30.0
