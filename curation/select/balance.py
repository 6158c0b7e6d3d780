"""Selector: balance the head of the metadata distribution (MetaCLIP, arXiv:2309.16671, sec. 3;
MetaCLIP 2, 2507.22062).

An entry matched by `count` pairs asks for each of them with probability t / max(count, t); a pair
is kept if at least one of its entries asks for it. So every pair that mentions a rare entry stays,
and the head is thinned.

| pool | t (max_pairs_per_entry) |
|---|---|
| 1.6 B English pairs -> 400 M | 20,000 |
| the 2.5 B set | 170,000 |
| another pool | the t that leaves 6 % of all matches in the tail: tail_fraction=0.06 |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.step import uniform


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
    """What is known once all parts are counted. counts, probability: per entry id."""

    counts: np.ndarray
    max_pairs_per_entry: float
    probability: np.ndarray


class Balance:
    """Keeps a pair with its inclusion probability, against one draw of (seed, "balance", uid).

    Exactly one of max_pairs_per_entry (t in MetaCLIP) and tail_fraction (t follows from the
        surviving counts).
    drop_unmatched: drop pairs without any entry, as MetaCLIP does (half of a web pool).
    Reasons: "no_entry" (no match), "head" (the draw was lost). Run it last: t refers to the
        surviving pairs.
    Price: reads one narrow column; the counts of all entries in memory.
    """

    name = "balance"
    version = 1
    reads = ("entries",)

    def __init__(
        self,
        *,
        max_pairs_per_entry: float | None = None,
        tail_fraction: float | None = None,
        drop_unmatched: bool = True,
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

    def measure(self, part: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """(entry ids, their counts) of the part, only those that occur."""
        ids = pc.list_flatten(part["entries"]).to_numpy()
        return np.unique(ids.astype(np.int64), return_counts=True)

    def combine(self, measures: list[Any]) -> Balanced:
        counts = np.zeros(
            1 + max((int(ids[-1]) for ids, _ in measures if len(ids)), default=-1), np.int64
        )
        for ids, part_counts in measures:
            counts[ids] += part_counts
        limit = self.max_pairs_per_entry
        if limit is None:
            occurring = counts[counts > 0]  # entries that nothing mentions have no say in the tail
            limit = language_threshold(counts=occurring, tail_fraction=self.tail_fraction)
        return Balanced(counts, limit, keep_probability(counts=counts, max_pairs_per_entry=limit))

    def apply(self, part: pa.Table, combined: Balanced, seed: int) -> pa.Array:
        """head, no_entry, or null."""
        column = part["entries"].combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        dropped = 1.0 - combined.probability[pc.list_flatten(column).to_numpy().astype(np.int64)]
        matched = lengths > 0
        inclusion = np.zeros(len(lengths))
        if matched.any():
            starts = (np.cumsum(lengths) - lengths)[matched]
            inclusion[matched] = 1.0 - np.multiply.reduceat(dropped, starts)
        draws = uniform(seed, self.name, part["uid"].to_pylist())
        reasons = np.full(len(lengths), None, object)
        # MetaCLIP 2 drops where the probability is below the draw, so a certain pair always stays
        reasons[matched & (inclusion < draws)] = "head"
        if self.drop_unmatched:
            reasons[~matched] = "no_entry"
        return pa.array(reasons, pa.string())
