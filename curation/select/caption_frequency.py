"""Drop captions that too many pairs share (ALIGN, arXiv:2102.05918, sec. 3: alt-texts of more than
10 images).

Boilerplate ("untitled", "stock photo", the name of a collection) says nothing about its image.
Balancing does not catch
it: a long boilerplate caption matches many entries, and 1 - prod(1 - p) of many small p is large.
"""

import re
from collections import Counter
from typing import Any

import pyarrow as pa

WORD = re.compile(r"\w+")


def spoken(caption: str) -> str:
    """The caption's words, lower-cased: what a person would call the same caption."""
    words = WORD.findall(caption.lower())
    return " ".join(words) if words else caption.strip()


class CaptionFrequency:
    """max_pairs_per_caption: captions (up to case and punctuation) of more pairs are dropped, all
    of them.

    Reason: frequent_caption. Price: a table of all distinct captions.
    """

    name, version = "caption_frequency", 1
    reads = ("caption",)

    def __init__(self, *, max_pairs_per_caption: int = 10):
        if max_pairs_per_caption < 1:
            raise ValueError(f"max_pairs_per_caption {max_pairs_per_caption}: must be at least 1")
        self.max_pairs_per_caption = max_pairs_per_caption

    def measure(self, part: pa.Table) -> Counter[str]:
        """Occurrences of each caption."""
        return Counter(spoken(caption) for caption in part["caption"].to_pylist())

    def combine(self, measures: list[Any]) -> frozenset[str]:
        """The captions that are too frequent."""
        total: Counter[str] = Counter()
        for counts in measures:
            total.update(counts)
        return frozenset(
            caption for caption, count in total.items() if count > self.max_pairs_per_caption
        )

    def apply(self, part: pa.Table, combined: frozenset[str], seed: int) -> pa.Array:
        """frequent_caption, or null."""
        captions = part["caption"].to_pylist()
        reasons = ["frequent_caption" if spoken(c) in combined else None for c in captions]
        return pa.array(reasons, pa.string())
