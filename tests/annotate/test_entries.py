import json
import pickle
import random

import pytest

from curation.annotate.entries import Entries, EntryMatcher, read_entries


def scan(entries, caption):
    """The reference's linear scan, MetaCLIP 1."""
    text = f" {caption} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for white in "\t\n\r":
        text = text.replace(white, " ")
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


def scan2(entries, caption):
    """The same for MetaCLIP 2, for the characters of the fuzz below only."""
    text = f" {caption} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    text = text.replace("\t", " ").replace("\n", " ")
    close = set("犬猫'.,;!`-。")
    return [
        i
        for i, entry in enumerate(entries)
        if ("" if entry[0] in close else " ") + entry + ("" if entry[-1] in close else " ") in text
    ]


HAND = ["dog", "hot dog", "hot", "Dog", "'s", ".38 caliber", "dog.", "a  b", "café", "犬", "イ"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a hot dog", ["dog", "hot dog", "hot"]),
        ("a hot  dog", ["dog", "hot"]),  # two spaces part the words
        ("hot, dog", ["dog", "hot"]),
        ("hot\ndog", ["dog", "hot dog", "hot"]),
        ("Dog!", ["Dog"]),
        ("(dog)", []),
        ("dog's dog-house dog/cat dog\u00a0", []),
        ("a .38 caliber dog.", ["dog"]),  # wrapped punctuation: such an entry never matches
        ("dog", ["dog"]),
        ("", []),
        ("犬", ["犬"]),
        ("小犬です", []),
    ],
)
def test_rule_1_by_hand(caption, expected):
    found = EntryMatcher(entries=HAND).match([caption])[0]
    assert [HAND[i] for i in found] == expected
    assert found == scan(HAND, caption)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("小犬です", ["犬"]),  # no spaces needed beside CJK
        ("アイス", []),  # kana needs them
        ("ア イ ス", ["イ"]),
        ("the dog's bone", ["'s"]),
        ("hot dog", ["dog", "hot dog", "hot"]),
    ],
)
def test_rule_2_by_hand(caption, expected):
    found = EntryMatcher(entries=HAND, rule="metaclip2").match([caption])[0]
    assert [HAND[i] for i in found] == expected


@pytest.mark.parametrize(("rule", "reference"), [("metaclip", scan), ("metaclip2", scan2)])
def test_equals_the_linear_scan_on_random_strings(rule, reference):
    rng = random.Random(0)
    letters = "ab a b.,;!`\t\n'-犬猫。 "
    for _ in range(150):
        entries = sorted({"".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(12)})
        captions = ["".join(rng.choices(letters, k=rng.randint(0, 14))) for _ in range(25)]
        found = EntryMatcher(entries=entries, rule=rule).match(captions)
        assert found == [reference(entries, caption) for caption in captions]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["dog", "cat", "dog"], "more than once.*'dog'"),
        (["dog", ""], "empty.*\\[1\\]"),
        (["dog", None], "not strings"),
        ("dog", "one string"),
    ],
)
def test_bad_entries(entries, message):
    with pytest.raises(ValueError, match=message):
        EntryMatcher(entries=entries)


def test_bad_rule_and_caption():
    with pytest.raises(ValueError, match="use metaclip or metaclip2"):
        EntryMatcher(entries=["dog"], rule="metaclip3")
    with pytest.raises(ValueError, match="caption 1 is None"):
        EntryMatcher(entries=["dog"]).match(["a dog", None])


@pytest.fixture
def entry_file(tmp_path):
    path = tmp_path / "entries.json"
    path.write_text(json.dumps({"entries": ["dog", "犬 x"]}), encoding="utf-8")
    return path


def test_annotator(entry_file):
    batch = [{"uid": "u", "caption": "a Dog"}, {"uid": "v", "caption": "dog 犬 x"}]
    strict = Entries(entries=str(entry_file))
    assert strict.annotate(batch) == [{"entries": []}, {"entries": [0, 1]}]
    lower = pickle.loads(pickle.dumps(Entries(entries=str(entry_file), lower_case=True)))
    assert lower.annotate(batch) == [{"entries": [0]}, {"entries": [0, 1]}]
    assert strict.inputs == {"entries": str(entry_file)}
    assert pickle.loads(pickle.dumps(strict))._matcher is None  # automata do not travel


def test_rule_2_strips_first(tmp_path):
    path = tmp_path / "entries.json"
    path.write_text(json.dumps(["x\u3000"]), encoding="utf-8")
    batch = [{"uid": "u", "caption": "x\u3000"}]
    assert Entries(entries=str(path)).annotate(batch) == [{"entries": [0]}]
    assert Entries(entries=str(path), rule="metaclip2").annotate(batch) == [{"entries": []}]


def test_annotator_refuses(entry_file, tmp_path):
    with pytest.raises(ValueError, match="caption of u is None"):
        Entries(entries=str(entry_file)).annotate([{"uid": "u", "caption": None}])
    with pytest.raises(ValueError, match="does not exist"):
        Entries(entries=str(tmp_path / "no.json")).annotate([])
    upper = tmp_path / "upper.json"
    upper.write_text('["Dog"]')
    with pytest.raises(ValueError, match="upper-case.*'Dog'"):
        Entries(entries=str(upper), lower_case=True).annotate([])
    upper.write_text('{"words": []}')
    with pytest.raises(ValueError, match="neither a list"):
        read_entries(upper)
