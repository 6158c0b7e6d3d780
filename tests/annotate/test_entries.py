import json
import pickle
import random
from itertools import pairwise

import pyarrow as pa
import pytest

from curation.annotate.entries import Entries, EntryMatcher, read_entries


def spacing(caption):
    text = f" {caption} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for white in "\t\n\r":
        text = text.replace(white, " ")
    return text


def scan(entries, caption):
    """The reference's linear scan, MetaCLIP 1."""
    text = spacing(caption)
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


def scan2(entries, caption):
    """The same for MetaCLIP 2, for the characters of the fuzz below only."""
    text, close = spacing(caption), set("犬猫'.,;:?!`-。")
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


# Words around the sizes at which the join looks them up differently (8 and 16 bytes), with equal
# beginnings and ends, NULs, and characters of two to four bytes.
WORDS = ["a", "b", "", "\0", "a\0", "\0a", "\u00a0", "é", "犬", "🐕", "x" * 7, "x" * 7 + "\0"]
WORDS += [f"{'x' * n}{end}" for n in (7, 8, 14, 15, 16, 17, 40) for end in ("y", "z", "é", "🐕")]
GAPS = [
    " ",
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "   ",
    ", ",
    ",",
    " ; ",
    ".:",
    "?!",
    "`",
]


def sentence(rng, most):
    words = rng.choices(WORDS, k=rng.randint(0, most))
    return "".join(part for word in words for part in (word, rng.choice(GAPS)))[
        : rng.choice([-1, None])
    ]


@pytest.mark.parametrize(("rule", "reference"), [("metaclip", scan), ("metaclip2", scan2)])
def test_equals_the_linear_scan_on_random_sentences(rule, reference):
    rng, runs = random.Random(1), 0
    for _ in range(40):
        captions = [sentence(rng, 20) for _ in range(40)]
        entries = {",", "\n", "a\nb", " a", "a ", "\xfe", *(sentence(rng, 3) for _ in range(20))}
        for caption in captions:  # what occurs
            tokens = spacing(caption).split(" ")
            start = rng.randrange(len(tokens))
            entries.add(" ".join(tokens[start : start + rng.randint(1, 4)]))
        entries = sorted(entries - {""})
        found = EntryMatcher(entries=entries, rule=rule).match(captions)
        assert found == [reference(entries, caption) for caption in captions]
        runs += sum(len(entries[i].split(" ")) == 4 for row in found for i in row)
    assert runs > 200


def test_very_long_captions():
    rng = random.Random(2)
    entries = ["a", "a a", "a a a b", "b", "x" * 50_000, "y", "a,", ","]
    captions = [
        "a " * 50_000,
        "x" * 50_000,
        "x" * 100_000,
        "," * 30_000,
        " " * 100_000,
        "\n" * 1000 + "a" + "\t" * 1000,
        " ".join(rng.choices(["a", "b", "zz"], k=40_000)),
        "y",
    ]
    assert EntryMatcher(entries=entries).match(captions) == [scan(entries, c) for c in captions]


def test_no_entries_no_captions():
    assert EntryMatcher(entries=[]).match(["a dog", ""]) == [[], []]
    for rule in ("metaclip", "metaclip2"):
        assert EntryMatcher(entries=["dog", "犬"], rule=rule).match([]) == []
        assert EntryMatcher(entries=["犬"], rule=rule).match(["", "犬"]) == [[], [0]]


@pytest.mark.parametrize("rule", ["metaclip", "metaclip2"])
def test_arrays_and_columns_say_the_same(rule):
    captions = ["a hot dog", "", "小犬 hot dog 's", "nothing", "Dog", "é café"]
    matcher = EntryMatcher(entries=HAND, rule=rule)
    found = matcher.match(captions)
    offsets, ids = matcher.match_flat(captions)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == found
    assert (offsets.dtype, ids.dtype) == ("int64", "int32")
    text = pa.array(["cut off", *captions])
    for given in (
        text[1:],
        text[1:].cast(pa.large_string()),
        pa.chunked_array([text[1:3], text[3:]]),
    ):
        column = matcher.match_lists(given)
        assert column.type == pa.list_(pa.int32())
        assert column.to_pylist() == found


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["dog", "cat", "dog"], "more than once.*'dog'"),
        (["dog", ""], "empty.*\\[1\\]"),
        (["dog", None], "not strings"),
        (["dog", "\ud83d"], "entry 1.*half a character"),
        ("dog", "one string"),
    ],
)
def test_bad_entries(entries, message):
    with pytest.raises(ValueError, match=message):
        EntryMatcher(entries=entries)


def test_bad_rule():
    with pytest.raises(ValueError, match="use metaclip or metaclip2"):
        EntryMatcher(entries=["dog"], rule="metaclip3")


@pytest.mark.parametrize("rule", ["metaclip", "metaclip2"])
@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a dog", None], "caption 1 is None"),
        ([None], "caption 0 is None"),
        (["a", 3], "caption 1 is 3"),
        (["a", "b", b"c"], "caption 2 is b'c'"),
        (["a", float("nan")], "caption 1 is nan"),
        (["a", "b\ud800"], "caption 1 is not text.*surrogate"),
        (pa.array(["a", None]), "caption 1 is None"),
        (pa.array([1]), "caption 0 is 1"),
        ("dog", "one string"),
    ],
)
def test_bad_captions(rule, captions, message):
    with pytest.raises(ValueError, match=message):
        EntryMatcher(entries=["dog", "犬"], rule=rule).match(captions)


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
    table = pa.table({"uid": ["u", "v"], "caption": [sample["caption"] for sample in batch]})
    for annotator in (strict, lower, Entries(entries=str(entry_file), rule="metaclip2")):
        rows = annotator.annotate_table(table)["entries"].to_pylist()
        assert [{"entries": ids} for ids in rows] == annotator.annotate(batch)
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
    table = pa.table({"uid": ["t", "u"], "caption": ["a", None]})
    with pytest.raises(ValueError, match="caption of u is None"):
        Entries(entries=str(entry_file)).annotate_table(table)
    with pytest.raises(ValueError, match="does not exist"):
        Entries(entries=str(tmp_path / "no.json")).annotate([])
    upper = tmp_path / "upper.json"
    upper.write_text('["Dog"]')
    with pytest.raises(ValueError, match="upper-case.*'Dog'"):
        Entries(entries=str(upper), lower_case=True).annotate([])
    upper.write_text('{"words": []}')
    with pytest.raises(ValueError, match="neither a list"):
        read_entries(upper)
