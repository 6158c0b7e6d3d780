"""Near duplicates by perceptual hash: rescaled and recompressed copies of a picture.

Letters: N pairs, H distinct 64-bit hashes, k the Hamming distance.

Chance of a random pair of hashes to be within k bits, sum_i C(64, i) / 2^64, and the number of
false pairs that a pool of a million different pictures would have:
| k | 2 | 4 | 6 | 8 | 10 | 12 |
|---|---|---|---|---|---|---|
| false pairs | 6e-5 | 0.02 | 2 | 1e2 | 5e3 | 1e5 |
Hashes of real pictures are less random than that, those of drawings and flat images much less.
"""

from collections.abc import Iterator
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pyarrow as pa

BITS = 64
MOST = 16  # bits; a quarter of the hash: beyond it random pictures agree too often to be dropped
_CANDIDATES = 2**20  # pairs compared at a time


def close_pairs(hashes: np.ndarray, *, max_distance: int) -> np.ndarray:
    """(M, 2) int64, all pairs i < j with Hamming distance <= max_distance, each once, ascending.

    hashes: (H,) uint64, distinct.
    Pigeonhole: cut into m bands, two hashes within k bits agree up to k // m bits in some band, so
    only pairs that share a band's neighbourhood are compared. m is chosen by the expected price.
    Price: for 2^20 random hashes about 60 comparisons a hash at k = 3, 600 at k = 4, 9,000 at
    k = 8; much more where many hashes share bands.
    """
    widths, radius = _bands(len(hashes), max_distance)
    found = [np.empty((0, 2), np.int64)]
    shift = 0
    for width in widths:
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        found.extend(_close_in_band(hashes, band, width, radius, max_distance))
        shift += width
    pairs = np.concatenate(found)
    return np.unique(pairs, axis=0)  # a pair may agree in several bands


def _bands(count: int, max_distance: int) -> tuple[list[int], int]:
    """(widths of the bands, Hamming radius within a band) of the least expected price."""

    def price(number: int) -> float:
        width, radius = BITS // number, max_distance // number
        probes = sum(comb(width, i) for i in range(radius + 1))
        # a probe is a binary search in the sorted band: as dear as some twenty comparisons
        return number * probes * (20 + count / 2.0**width)

    number = min(range(1, max_distance + 2), key=price)
    widths = [BITS // number + (i < BITS % number) for i in range(number)]
    return widths, max_distance // number


def _close_in_band(
    hashes: np.ndarray, band: np.ndarray, width: int, radius: int, max_distance: int
) -> Iterator[np.ndarray]:
    order = np.argsort(band, kind="stable")
    band_sorted = band[order]
    for flips in _masks(width, radius):
        probe = band_sorted ^ flips
        first = np.searchsorted(band_sorted, probe, side="left")
        last = np.searchsorted(band_sorted, probe, side="right")
        # each pair of places once: the other one further on
        first = np.maximum(first, np.arange(1, len(order) + 1))
        counts = np.maximum(last - first, 0)
        for rows in _chunks(counts):
            left = np.repeat(np.arange(rows.start, rows.stop), counts[rows])
            ends = np.cumsum(counts[rows])
            within = np.arange(len(left)) - np.repeat(ends - counts[rows], counts[rows])
            a, b = order[left], order[first[left] + within]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= max_distance
            a, b = a[close], b[close]
            yield np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1)


def _masks(width: int, radius: int) -> Iterator[np.uint64]:
    for weight in range(radius + 1):
        for bits in combinations(range(width), weight):
            yield np.uint64(sum(1 << bit for bit in bits))


def _chunks(counts: np.ndarray) -> Iterator[slice]:
    """Runs of rows with some _CANDIDATES pairs together."""
    cuts = np.searchsorted(
        np.cumsum(counts), np.arange(_CANDIDATES, counts.sum() + _CANDIDATES, _CANDIDATES)
    )
    start = 0
    for stop in [*(np.unique(cuts) + 1).tolist(), len(counts)]:
        stop = min(stop, len(counts))
        if stop > start:
            yield slice(start, stop)
        start = stop


def leaders(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) bool: taken in ascending order, each that is close to none already taken.

    pairs: (M, 2) ascending, i < j. So those taken are pairwise far, and all others close to one.
    """
    taken = np.ones(count, bool)
    bounds = np.searchsorted(pairs[:, 0], np.arange(count + 1))
    for i in np.unique(pairs[:, 0]).tolist():
        if taken[i]:
            taken[pairs[bounds[i] : bounds[i + 1], 1]] = False
    return taken


class PerceptualDuplicates:
    """Drops pairs whose image looks like that of a pair that stays ("perceptual_duplicate").

    By ascending uid, a pair stays if no pair that stays has a phash within max_distance bits: those
    that stay are more than max_distance apart, and each that goes is close to one that stays. A
    null phash (the image could not be decoded) is no duplicate.
    max_distance: 0 to 16 of 64 bits; 4 finds recompression and rescaling, see the table above.
    Price: 40 bytes a pair; seconds for a million at 4. Flat images (one colour) look all alike to
        the hash; captions are not compared.
    """

    name = "perceptual_duplicates"
    version = 1
    reads = ("phash",)

    def __init__(self, *, max_distance: int = 4):
        if not 0 <= max_distance <= MOST:
            raise ValueError(
                f"max_distance {max_distance} is outside [0, {MOST}]: random hashes differ in 32 "
                "bits, 2 to 8 find copies"
            )
        self.max_distance = max_distance

    def measure(self, part: pa.Table) -> dict[str, np.ndarray]:
        """uid and phash of the pairs that have one."""
        hashed = part.filter(part["phash"].is_valid())
        return {
            "uid": np.asarray(hashed["uid"].to_pylist(), dtype=str),
            "phash": hashed["phash"].to_numpy().astype(np.uint64, copy=False),
        }

    def combine(self, measures: list[dict[str, Any]]) -> frozenset[str]:
        """The uids that go."""
        measures = [measure for measure in measures if len(measure["uid"])]
        if not measures:
            return frozenset()
        uid = np.concatenate([measure["uid"] for measure in measures])
        hashes = np.concatenate([measure["phash"] for measure in measures])
        by_uid = np.argsort(uid, kind="stable")
        uid, hashes = uid[by_uid], hashes[by_uid]
        _, first = np.unique(hashes, return_index=True)
        first.sort()  # distinct hashes by the smallest uid that has them
        taken = leaders(len(first), close_pairs(hashes[first], max_distance=self.max_distance))
        gone = np.ones(len(uid), bool)
        gone[first[taken]] = False
        return frozenset(uid[gone].tolist())

    def apply(self, part: pa.Table, combined: frozenset[str], seed: int) -> pa.Array:
        """perceptual_duplicate, or null."""
        reasons = [
            "perceptual_duplicate" if uid in combined else None for uid in part["uid"].to_pylist()
        ]
        return pa.array(reasons, pa.string())
