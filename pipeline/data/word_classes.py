"""Noun, adjective, verb or something else: a class for every token id, for text_tokens=syntax.

The lexicon beside the vocabulary holds the English words that are mostly no nouns, from WordNet 3.0
and its counts of tagged words (pipeline.data.make_word_classes). Everything else counts as a noun:
names, unknown words, other languages, and every piece of a word that goes on, so that a rare word
is kept whole or nearly. Punctuation and digits are neither.
Price: one class a spelling ("orange" is an adjective in "orange paint", a noun here).
"""

import gzip
import unicodedata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

LEXICON = Path(__file__).resolve().parent / "vocabulary" / "word_classes.txt.gz"
# CLIPA's order of what is kept first
NOUN, ADJECTIVE, VERB, OTHER = 1, 2, 3, 4


class Pieces(Protocol):
    """A tokenizer that can spell its ids: UTF-8 bytes, and whether a word ends with them."""

    def pieces(self) -> list[tuple[bytes, bool]]: ...


def word_classes(*, tokenizer: Pieces) -> Tensor:
    """(V,) int8 in {1, 2, 3, 4}: the class of each id. The first comes first: noun, adjective,
    verb, other.
    """
    words = lexicon()
    return torch.tensor([class_of(*piece, words) for piece in tokenizer.pieces()], dtype=torch.int8)


def class_of(spelling: bytes, ends_word: bool, words: Mapping[str, int]) -> int:
    """The class of one piece. ends_word: whether the piece may be a whole word."""
    try:
        text = spelling.decode()
    except UnicodeDecodeError:
        return NOUN  # a part of a character, so of a word in another script, or of an emoji
    categories = {unicodedata.category(character) for character in text}
    if not any(category[0] in "LM" or category == "So" for category in categories):
        return OTHER
    return words.get(text, NOUN) if ends_word else NOUN


@cache
def lexicon() -> dict[str, int]:
    """Lower-case word -> class, for words that are mostly no nouns."""
    lines = gzip.decompress(LEXICON.read_bytes()).decode("ascii").splitlines()
    return {word: int(number) for word, number in (line.split(" ") for line in lines)}
