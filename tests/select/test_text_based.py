import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from curation.select.text_based import FirstSynsets, TextBased, entity_words

# lemma pos synset_cnt p_cnt pointers sense_cnt tagsense_cnt offsets, below a licence in spaces
INDEX = {
    "noun": """  1 licence
dog n 2 2 @ ~ 2 1 00000001 00000002
pie n 1 0 1 0 00000003
glass n 1 1 @ 1 0 00000004
glasses n 1 0 1 0 00000008
goose n 1 0 1 0 00000005
fireman n 1 0 1 0 00000006
hot_dog n 1 0 1 0 00000007
""",
    "verb": "dog v 1 0 1 0 00000011\nrun v 2 1 @ 2 0 00000012 00000013\nbake v 1 0 1 0 00000014\n",
    "adj": "red a 1 0 1 0 00000021\n",
    "adv": "very r 1 0 1 0 00000031\n",
}
EXCEPTIONS = {"noun": "geese goose\n", "verb": "ran run\n", "adj": "redder red\n", "adv": ""}


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for kind in INDEX:
        (folder / f"index.{kind}").write_text(INDEX[kind])
        (folder / f"{kind}.exc").write_text(EXCEPTIONS[kind])
    return folder


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(["dog", "Dogs", "猫"]))
    return str(path)


def decide(selector, captions, languages=None):
    table = pa.table(
        {
            "uid": pa.array([str(i) for i in range(len(captions))], pa.string()),
            "caption": pa.array(captions, pa.string()),
            "language": pa.array(languages or ["en"] * len(captions), pa.string()),
        }
    ).select(["uid", *selector.reads])
    combined = selector.combine([selector.measure(table)])
    answer = selector.apply(table, combined, 0)
    assert answer.type == pa.string()
    return answer.to_pylist()


def test_keeps_captions_with_a_word(words):
    captions = ["a DOG", "two\ndogs\trun", "a dog, and", "hotdog", "一只 猫", "一只猫", "", None]
    kept = [True, True, False, False, True, False, False, False]
    assert decide(TextBased(words=words), captions) == [None if k else "no_entity" for k in kept]


def test_language_counts_first(words):
    found = decide(TextBased(words=words), ["dog", "cat", "dog"], ["de", None, "en"])
    assert found == ["language", "language", None]
    anything = TextBased(words=words, languages=None)
    assert anything.reads == ("caption",)
    assert decide(anything, ["dog", "cat"], ["de", None]) == [None, "no_entity"]


def test_equals_a_loop(words):
    rng = np.random.default_rng(0)
    vocabulary = ["dog", "Dogs", "dog.", "cat", "猫", "猫s", "\n", "\u3000", "a"]
    captions = [
        rng.choice(["", " "]).join(rng.choice(vocabulary, rng.integers(0, 5))) for _ in range(3000)
    ]
    expected = []
    for caption in captions:
        found = any(word.lower() in ("dog", "dogs", "猫") for word in caption.split())
        expected.append(None if found else "no_entity")
    assert decide(TextBased(words=words), captions) == expected
    assert 500 < expected.count(None) < 2500


def test_first_synsets_by_hand(wordnet):
    first = FirstSynsets(wordnet)
    expected = {
        "dog": 1,  # the noun's first sense, though it is a verb too
        "DOGS": 1,
        "pies": 3,  # pie by "s", not py by "ies"
        "glasses": 8,  # the word itself before glass
        "geese": 5,
        "gooses": 5,
        "firemen": 6,
        "hot_dog": 7,
        "dogging": None,  # not dog: no rule takes a doubled letter off
        "ran": 12,
        "runs": 12,
        "baking": 14,
        "baked": 14,
        "redder": 21,
        "very": 31,
        "verys": None,
        "dogss": None,
        "cat": None,
        "": None,
    }
    assert {word: first.of(word) for word in expected} == expected


def test_words_of_synsets(wordnet):
    first = FirstSynsets(wordnet)
    nouns = {"geese", "goose", "gooses", "hot_dog", "hot_dogs"}
    verbs = {"ran", "run", "runed", "runes", "runing", "runs"}
    assert entity_words(first, {5, 7, 12}) == sorted(nouns | verbs)
    assert "dogs" not in entity_words(first, {11})  # the verb is not its first synset


def test_the_command_writes_what_the_selector_reads(wordnet, tmp_path):
    synsets, out = tmp_path / "ids.txt", tmp_path / "out.json"
    synsets.write_text("n00000001\nn00000003\n")
    command = [sys.executable, "-m", "curation.select.text_based", wordnet, synsets, out]
    subprocess.run(command, check=True)
    assert decide(TextBased(words=str(out)), ["Dogs", "pies", "goose"]) == [None, None, "no_entity"]
    synsets.write_text("tench\n")
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "['tench'] are no synset ids" in refused.stderr


def test_missing_and_bad_files(tmp_path, wordnet):
    with pytest.raises(ValueError, match=r"none\.json does not exist.*WORDNET_FOLDER"):
        TextBased(words=str(tmp_path / "none.json"))
    for content, message in (
        ("{}", "holds no list"),
        ("[]", "holds no list"),
        ("dog", "is not JSON"),
        ('["hot dog", 3, ""]', "3 items .* not single words"),
    ):
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            decide(TextBased(words=str(path)), ["x"])
    with pytest.raises(ValueError, match="need a list"):
        TextBased(words=str(path), languages="en")
    (wordnet / "adv.exc").unlink()
    with pytest.raises(ValueError, match=r"holds no adv\.exc"):
        FirstSynsets(wordnet)
