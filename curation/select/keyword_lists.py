"""Drop captions that are lists of keywords, not names or sentences.

Conceptual Captions (Sharma et al., ACL 2018, sec. 3.2) drops captions without determiner,
preposition or verb, and
those of too many nouns; that needs a part-of-speech tagger and would drop names as well. This
reading needs none: two
or more items between commas or semicolons, each of at most a few words, is a list. A colon
introduces a name's
attributes ("flag: Chad", "woman: red hair, long"), so captions with one are left alone, except
between digits (8:30).
Price: real enumerations of single words go too ("salt, pepper").
"""

import re
from typing import Any

import pyarrow as pa

SEPARATOR = re.compile(r"[,;\uff0c\u3001]")
COLON = re.compile(r":(?!\d)")


def is_keyword_list(caption: str, *, max_words_per_item: int = 2) -> bool:
    """Two or more separated items, none longer than max_words_per_item words, no colon."""
    if COLON.search(caption):
        return False
    items = [item.split() for item in SEPARATOR.split(caption)]
    return len(items) >= 2 and all(0 < len(item) <= max_words_per_item for item in items)


class KeywordLists:
    """max_words_per_item: an item of more words is a phrase, and its caption stays. Reason:
    keyword_list.
    """

    name, version = "keyword_lists", 1
    reads = ("caption",)

    def __init__(self, *, max_words_per_item: int = 2):
        if max_words_per_item < 1:
            raise ValueError(f"max_words_per_item {max_words_per_item}: must be at least 1")
        self.max_words_per_item = max_words_per_item

    def measure(self, part: pa.Table) -> None:
        """Each caption is judged alone."""

    def combine(self, measures: list[Any]) -> None:
        """Nothing to combine."""

    def apply(self, part: pa.Table, combined: None, seed: int) -> pa.Array:
        """keyword_list, or null."""
        words = self.max_words_per_item
        found = [
            "keyword_list" if is_keyword_list(caption, max_words_per_item=words) else None
            for caption in part["caption"].to_pylist()
        ]
        return pa.array(found, pa.string())
