"""Selector: balance the head of the metadata distribution (MetaCLIP, arXiv:2309.16671, sec. 3;
MetaCLIP 2, 2507.22062).

An entry matched by `count` pairs asks for each of them with probability t / max(count, t); a pair
is kept if at least one of its entries asks for it. So every pair that mentions a rare entry stays,
and the head is thinned.

By language (MetaCLIP 2, sec. 3.2): an entry is counted in each language apart, and t of a language
is the one that leaves it the same tail share as t leaves to English, so that a small language is
not thinned by a threshold made for a large one.

| pool | t (max_pairs_per_entry) |
|---|---|
| 1.6 B English pairs -> 400 M | 20,000 |
| the 2.5 B set | 170,000 |
| another pool | the t that leaves 6 % of all matches in the tail: tail_fraction=0.06 |
| by language | t of English as above; the others' from its tail share |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.step import uniform

UNDETERMINED = "other"  # as the language annotator says; selectors know columns, not annotators


def keep_probability(*, counts: Sequence[int], max_pairs_per_entry: float) -> np.ndarray:
    """t / max(count, t) of each entry, float64. t (max_pairs_per_entry) >= 1; infinity keeps
    everything.

    Raises ValueError for t < 1 (t = 0 would drop every matched pair and give 0/0 for the others)
        and negative counts.
    """
    counts = np.asarray(counts)
    if not max_pairs_per_entry >= 1:
        raise ValueError(f"max_pairs_per_entry {max_pairs_per_entry}: need at least 1")
    if counts.size and counts.min() < 0:
        raise ValueError(f"counts hold {counts.min()}: need numbers of pairs, 0 or more")
    if np.isinf(max_pairs_per_entry):
        return np.ones(counts.shape, np.float64)
    return max_pairs_per_entry / np.maximum(counts, max_pairs_per_entry).astype(np.float64)


def tail_fraction(*, counts: Sequence[int], max_pairs_per_entry: float) -> float:
    """The share of all matches that belong to entries with fewer than t pairs ("p" in MetaCLIP 2);
    0 without matches.
    """
    counts = np.asarray(counts)
    total = counts.sum()
    return float(counts[counts < max_pairs_per_entry].sum() / total) if total else 0.0


def language_threshold(*, counts: Sequence[int], tail_fraction: float) -> int:
    """t whose tail holds about `tail_fraction` of the matches: MetaCLIP 2 takes it from English for
    every language.

    The count at which the cumulated sorted counts come closest to the fraction, the smallest on
    ties. At least 1: the reference returns 0 where most of the mass is in one entry, or without
    matches, and then drops the whole language.
    Raises ValueError if tail_fraction is outside [0, 1].
    """
    if not 0.0 <= tail_fraction <= 1.0:
        raise ValueError(f"tail_fraction {tail_fraction} is outside [0, 1]")
    ascending = np.sort(np.asarray(counts))
    total = ascending.sum() if ascending.size else 0
    if total == 0:
        return 1
    distance = np.abs(np.cumsum(ascending) / total - tail_fraction)
    return max(1, int(ascending[np.argmin(distance)]))


def inclusion_probability(*, entry_ids: Sequence[int], probability: np.ndarray) -> float:
    """Probability that a pair with these entries is kept: 1 - prod(1 - p). 0 without entries."""
    ids = np.asarray(entry_ids, dtype=np.int64)
    return float(1.0 - np.prod(1.0 - np.asarray(probability, dtype=np.float64)[ids]))


@dataclass(frozen=True)
class Balanced:
    """What is known of one language (or of all pairs together) once all parts are counted.

    counts, probability: per entry id; or, where `ids` is given (ascending), per position in it.
    """

    counts: np.ndarray
    max_pairs_per_entry: float
    probability: np.ndarray
    ids: np.ndarray | None = None

    def inclusion(self, entries: pa.Array) -> np.ndarray:
        """`inclusion_probability` of each row of ids, float64. 0 for an empty or null row."""
        lengths = pc.fill_null(pc.list_value_length(entries), 0).to_numpy().astype(np.int64)
        ids = pc.list_flatten(entries).to_numpy().astype(np.int64)
        places = ids if self.ids is None else np.searchsorted(self.ids, ids)
        matched = lengths > 0
        inclusion = np.zeros(len(lengths))
        if matched.any():
            starts = (np.cumsum(lengths) - lengths)[matched]
            lost = np.multiply.reduceat(1.0 - self.probability[places], starts)
            inclusion[matched] = 1.0 - lost
        return inclusion


class Balance:
    """Keeps a pair with its inclusion probability, against one draw of (seed, "balance", uid).

    Exactly one of max_pairs_per_entry (t in MetaCLIP) and tail_fraction (t follows from the
        surviving counts).
    per_language: count and threshold each language apart, by the column of annotate/language (a
        null counts as "other"). max_pairs_per_entry is then the main_language's t; its tail share
        gives every other language's t. With tail_fraction every language's t follows from it.
        A language's tail is measured over the entries that it mentions. The reference counts the
        others too, and returns t = 0 for a language whose rarest entry holds more than twice the
        share, which drops the whole language; here t is then that entry's count.
    drop_unmatched: drop pairs without any entry, as MetaCLIP does (half of a web pool).
    Reasons: "no_entry" (no match), "head" (the draw was lost). Run it last: t refers to the
        surviving pairs. To draw anew in every epoch instead, see select/late_balance.
    Price: reads one or two narrow columns; the counts of all entries in memory, by language those
        that occur in it.
    """

    name = "balance"
    version = 1

    def __init__(
        self,
        *,
        max_pairs_per_entry: float | None = None,
        tail_fraction: float | None = None,
        drop_unmatched: bool = True,
        per_language: bool = False,
        main_language: str = "en",
    ):
        if (max_pairs_per_entry is None) == (tail_fraction is None):
            raise ValueError(
                f"max_pairs_per_entry={max_pairs_per_entry} and tail_fraction={tail_fraction}: "
                "set exactly one of them, the other to null"
            )
        if max_pairs_per_entry is not None and not max_pairs_per_entry >= 1:
            raise ValueError(f"max_pairs_per_entry {max_pairs_per_entry}: need at least 1")
        if tail_fraction is not None and not 0.0 <= tail_fraction <= 1.0:
            raise ValueError(f"tail_fraction {tail_fraction} is outside [0, 1]")
        self.max_pairs_per_entry = max_pairs_per_entry
        self.tail_fraction = tail_fraction
        self.drop_unmatched = drop_unmatched
        self.per_language = per_language
        self.main_language = main_language
        self.reads = ("entries", "language") if per_language else ("entries",)

    def measure(self, part: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Language ("" for all together) -> (entry ids, their counts), only those that occur."""
        return {
            language: np.unique(
                pc.list_flatten(entries).to_numpy().astype(np.int64), return_counts=True
            )
            for language, _, entries in self._languages(part)
        }

    def combine(self, measures: list[Any]) -> dict[str, Balanced]:
        """What is known of each language; of all together under "".

        Raises ValueError when the main language, which gives the others' tail share, has no match.
        """
        if not self.per_language:
            return {"": self._together([measure[""] for measure in measures])}
        counted = {
            language: _summed([m[language] for m in measures if language in m])
            for language in sorted(set().union(*measures))
        }
        share = self.tail_fraction
        if share is None:
            _, main = counted.get(self.main_language, (None, np.empty(0, np.int64)))
            if not len(main) and any(len(ids) for ids, _ in counted.values()):
                raise ValueError(
                    f"per_language=true takes the tail share from {self.main_language!r}, of which "
                    f"no pair has an entry (there are: {', '.join(counted)}): set tail_fraction "
                    "instead of max_pairs_per_entry, or another main_language"
                )
            share = tail_fraction(counts=main, max_pairs_per_entry=self.max_pairs_per_entry)
        found = {}
        for language, (ids, counts) in counted.items():
            if self.tail_fraction is None and language == self.main_language:
                limit = self.max_pairs_per_entry
            else:
                limit = language_threshold(counts=counts, tail_fraction=share)
            p = keep_probability(counts=counts, max_pairs_per_entry=limit)
            found[language] = Balanced(counts, limit, p, ids)
        return found

    def apply(self, part: pa.Table, combined: dict[str, Balanced], seed: int) -> pa.Array:
        """head, no_entry, or null."""
        inclusion = self.inclusion(part, combined)
        draws = uniform(seed, "balance", part["uid"].to_pylist())
        # MetaCLIP 2 drops where the probability is below the draw, so a certain pair always stays
        reasons = np.where(inclusion < draws, "head", None).astype(object)
        reasons[unmatched(part)] = "no_entry" if self.drop_unmatched else None
        return pa.array(reasons, pa.string())

    def inclusion(self, part: pa.Table, combined: dict[str, Balanced]) -> np.ndarray:
        """The probability of every pair to be kept, float64; 0 without entries."""
        inclusion = np.zeros(part.num_rows)
        for language, rows, entries in self._languages(part):
            inclusion[rows] = combined[language].inclusion(entries)
        return inclusion

    def _together(self, measures: list[tuple[np.ndarray, np.ndarray]]) -> Balanced:
        """Without languages, by id: no search is needed to look one up."""
        ids, occurring = _summed(measures)
        limit = self.max_pairs_per_entry
        if limit is None:  # entries that nothing mentions have no say in the tail
            limit = language_threshold(counts=occurring, tail_fraction=self.tail_fraction)
        counts = np.zeros(1 + (int(ids[-1]) if len(ids) else -1), np.int64)
        counts[ids] = occurring
        return Balanced(counts, limit, keep_probability(counts=counts, max_pairs_per_entry=limit))

    def _languages(self, part: pa.Table) -> Iterator[tuple[str, Any, pa.Array]]:
        """(language, its rows, their entries); all under "" where languages do not matter."""
        entries = part["entries"].combine_chunks()
        if not self.per_language:
            yield "", slice(None), entries
            return
        codes = pc.fill_null(part["language"].combine_chunks(), UNDETERMINED).dictionary_encode()
        indices = codes.indices.to_numpy()
        by_language = np.argsort(indices, kind="stable")
        bounds = np.searchsorted(indices[by_language], np.arange(len(codes.dictionary) + 1))
        for place, language in enumerate(codes.dictionary.to_pylist()):
            rows = by_language[bounds[place] : bounds[place + 1]]
            yield language, rows, entries.take(pa.array(rows))


def unmatched(part: pa.Table) -> np.ndarray:
    """(rows,) bool: pairs without an entry."""
    return pc.fill_null(pc.list_value_length(part["entries"]), 0).to_numpy() == 0


def _summed(measures: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) of several (ids, counts), ascending."""
    ids = np.unique(np.concatenate([ids for ids, _ in measures] or [np.empty(0, np.int64)]))
    counts = np.zeros(len(ids), np.int64)
    for part_ids, part_counts in measures:
        counts[np.searchsorted(ids, part_ids)] += part_counts
    return ids, counts
