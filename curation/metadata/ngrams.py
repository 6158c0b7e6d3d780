"""Counting words and word pairs as matching cuts them, exactly and in bounded memory."""

import heapq
import math
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby, pairwise
from pathlib import Path

from curation.metadata.spacing import spaced


class SpillingCounter:
    """Occurrences of strings without line breaks. Above `max_keys` distinct ones the counts so far
    go to a sorted file in a temporary folder, and `items` merges the files: nothing is rounded off.

    Price: about 100 bytes of memory per key up to max_keys, then disk of about the keys' length.
    """

    def __init__(self, *, max_keys: int = 20_000_000):
        self.max_keys = max_keys
        self._counts: Counter[str] = Counter()
        self._folder = tempfile.TemporaryDirectory(prefix="ngrams-")
        self._files: list[Path] = []

    def update(self, keys: Iterable[str]) -> None:
        self._counts.update(keys)
        if len(self._counts) > self.max_keys:
            path = Path(self._folder.name) / str(len(self._files))
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{key}\t{count}\n" for key, count in sorted(self._counts.items()))
            self._files.append(path)
            self._counts.clear()

    def items(self) -> Iterator[tuple[str, int]]:
        """Each string once with its count; in code point order."""
        with ExitStack() as stack:
            parts = [
                map(_parsed, stack.enter_context(path.open(encoding="utf-8", newline="\n")))
                for path in self._files
            ]
            merged = heapq.merge(*parts, sorted(self._counts.items()))
            for key, group in groupby(merged, key=lambda item: item[0]):
                yield key, sum(count for _, count in group)


def _parsed(line: str) -> tuple[str, int]:
    key, count = line.rsplit("\t", 1)
    return key, int(count)


def count_ngrams(
    texts: Iterable[str], *, lower_case: bool = False, max_pairs: int = 20_000_000
) -> tuple[Counter[str], SpillingCounter]:
    """Occurrences of words, and of "first second" pairs of words with one space between them.

    A word is what stands between spaces in the spaced text, and begins and ends with a letter, a
    digit or a combining mark (Thai and Hindi words end with those).
    max_pairs: distinct pairs in memory. The words are all in memory: 2 GB for English Wikipedia.
    Price: half a million words a second and core.
    """
    unigrams: Counter[str] = Counter()
    bigrams = SpillingCounter(max_keys=max_pairs)
    for text in texts:
        tokens = spaced(text.lower() if lower_case else text).split(" ")
        words = [token if token and _is_word(token) else None for token in tokens]
        unigrams.update(word for word in words if word)
        bigrams.update(f"{first} {second}" for first, second in pairwise(words) if first and second)
    return unigrams, bigrams


def _is_word(token: str) -> bool:
    return all(
        edge.isalnum() or unicodedata.category(edge) in ("Mn", "Mc")
        for edge in (token[0], token[-1])
    )


def frequent(counts: Mapping[str, int], *, min_count: int) -> list[str]:
    """Strings by falling count, then in code point order."""
    enough = [(-count, key) for key, count in counts.items() if count >= min_count]
    return [key for _, key in sorted(enough)]


def associated_bigrams(
    unigrams: Counter[str],
    bigrams: SpillingCounter,
    *,
    min_count: int,
    min_pmi: float,
) -> list[str]:
    """Pairs "a b" by falling pointwise mutual information log2(n_ab * W / (n_a * n_b)), W words in
    all; then in code point order.
    """
    total = unigrams.total()
    scored = []
    for pair, count in bigrams.items():
        if count >= min_count:
            first, second = pair.split(" ")
            # ordered by the quotient: division rounds alike everywhere, logarithms may not
            more_often = count * total / (unigrams[first] * unigrams[second])
            if math.log2(more_often) >= min_pmi:
                scored.append((-more_often, pair))
    return [pair for _, pair in sorted(scored)]
