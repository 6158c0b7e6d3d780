"""Selector: DataComp's text-based filter (arXiv:2304.14108; baselines/apply_filter.py):
keep English captions that name one of ImageNet-21k's things.

A word counts if the first WordNet synset of it is one of a given set. Which words those are is
settled once, outside of the pool, by

    python -m curation.select.text_based WORDNET_FOLDER SYNSETS WORDS.json

from WordNet 3.0's own files (Debian: wordnet-base) and a list of synset ids, one a line, as
ImageNet's `n01440764`. It finds the first synset as nltk does: nouns before verbs, adjectives and
adverbs, exceptions and endings taken off (morphy, man 7WN), offsets compared without the part of
speech. Words off which more than one ending would have to be taken ("dogss") are left out.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

# WordNet's parts of speech in nltk's order, and the endings that morphy replaces
_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ing", "e"),
        ("ing", ""),
    ),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}


class FirstSynsets:
    """The first synset of a word. folder: holds index.* and *.exc of WordNet 3.0."""

    def __init__(self, folder: Path):
        self.offsets: dict[str, dict[str, int]] = {}
        self.exceptions: dict[str, dict[str, list[str]]] = {}
        for kind in _ENDINGS:
            for name in (f"index.{kind}", f"{kind}.exc"):
                if not (folder / name).is_file():
                    raise ValueError(
                        f"{folder} holds no {name}: give the folder of WordNet 3.0's database "
                        "(Debian: wordnet-base)"
                    )
            lines = (folder / f"index.{kind}").read_text(encoding="ascii").splitlines()
            # lemma pos synset_cnt p_cnt [pointer ...] sense_cnt tagsense_cnt offset ...
            rows = [line.split() for line in lines if not line.startswith(" ")]
            self.offsets[kind] = {row[0]: int(row[6 + int(row[3])]) for row in rows}
            lines = (folder / f"{kind}.exc").read_text(encoding="ascii").splitlines()
            self.exceptions[kind] = {row[0]: row[1:] for row in map(str.split, lines) if row}

    def of(self, word: str) -> int | None:
        """Its offset; None if WordNet does not know the lower-cased word."""
        word = word.lower()
        for kind, endings in _ENDINGS.items():
            known = self.offsets[kind]
            if word in self.exceptions[kind]:
                forms = [word, *self.exceptions[kind][word]]
            else:
                cut = ((word.removesuffix(e) + base) for e, base in endings if word.endswith(e))
                forms = [word, *cut]
            first = next((known[form] for form in forms if form in known), None)
            if first is not None:
                return first
        return None

    def words(self) -> Iterator[str]:
        """Every lemma, exception, and lemma with an ending; some more than once."""
        for kind, endings in _ENDINGS.items():
            yield from self.exceptions[kind]
            for lemma in self.offsets[kind]:
                yield lemma
                for ending, base in endings:
                    if lemma.endswith(base):
                        yield lemma.removesuffix(base) + ending


def read_words(path: str) -> frozenset[str]:
    """The lower-cased words of a JSON list. Raises ValueError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): need a list of words") from error
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"{path} holds no list of words: need a JSON list such as ['dog', 'tench']"
        )
    wrong = [word for word in content if not isinstance(word, str) or len(word.split()) != 1]
    if wrong:
        raise ValueError(
            f"{len(wrong)} items of {path} are not single words, such as {wrong[:3]}: captions are "
            "cut at white space and compared word by word"
        )
    return frozenset(word.lower() for word in content)


class TextBased:
    """Keeps captions of which at least one word is in the list ("no_entity" otherwise) and whose
    language is one of languages ("language", which counts first).

    words: a JSON list of single words, see the module. A caption is cut at white space and nothing
        else, and lower-cased, as in DataComp: "dog," is not "dog".
    languages: of annotate/language; null: any.
    Price: one pass over the captions, 1 us each.
    """

    name = "text_based"
    version = 1

    def __init__(self, *, words: str, languages: Sequence[str] | None = ("en",)):
        if isinstance(languages, str) or (languages is not None and not languages):
            raise ValueError(f"languages {languages!r}: need a list such as [en], or null for all")
        if not Path(words).is_file():
            raise ValueError(
                f"words file {words} does not exist: make it by python -m "
                "curation.select.text_based WORDNET_FOLDER SYNSETS WORDS.json"
            )
        self.languages = None if languages is None else frozenset(languages)
        self.inputs = {"words": words}
        self.reads = ("caption", *(["language"] if languages is not None else []))

    def measure(self, part: pa.Table) -> None:
        """Nothing: each caption is judged alone."""

    def combine(self, measures: list[Any]) -> frozenset[str]:
        """The words."""
        return read_words(self.inputs["words"])

    def apply(self, part: pa.Table, combined: frozenset[str], seed: int) -> pa.Array:
        """language, no_entity, or null."""
        reasons = np.full(part.num_rows, None, object)
        captions = part["caption"].to_pylist()
        named = [not combined.isdisjoint((c or "").lower().split()) for c in captions]
        reasons[~np.array(named, bool)] = "no_entity"
        if self.languages is not None:
            spoken = [code in self.languages for code in part["language"].to_pylist()]
            reasons[~np.array(spoken, bool)] = "language"
        return pa.array(reasons, pa.string())


def entity_words(wordnet: FirstSynsets, synsets: set[int]) -> list[str]:
    """The distinct words whose first synset is one of the offsets, sorted."""
    return sorted({word for word in wordnet.words() if wordnet.of(word) in synsets})


def main() -> None:
    parser = argparse.ArgumentParser(description="Words whose first WordNet synset is in a list.")
    parser.add_argument("wordnet", type=Path, help="folder of index.noun, noun.exc and so on")
    parser.add_argument("synsets", type=Path, help="synset ids, one a line, such as n01440764")
    parser.add_argument("words", type=Path, help="the JSON to write")
    given = parser.parse_args()
    ids = given.synsets.read_text(encoding="ascii").split()
    wrong = [text for text in ids if not text.lstrip("nvasr").isdecimal()]
    if wrong:
        parser.error(f"{given.synsets}: {wrong[:3]} are no synset ids such as n01440764")
    found = entity_words(FirstSynsets(given.wordnet), {int(text.lstrip("nvasr")) for text in ids})
    given.words.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
