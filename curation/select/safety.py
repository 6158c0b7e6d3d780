"""Selector: a hook for safety. A score that somebody's model gave, and a list of blocked hashes; no
model of ours.

LAION-aesthetic lists pairs whose punsafe (a detector on CLIP embeddings, 1 is unsafe) is below 0.5.
LAION-5B was withdrawn and cleaned by hash lists: so any pool of web images needs such a list, from
those who may keep one. A score and a list find what they know; neither makes a pool safe.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

_COLUMNS = {64: "sha256", 32: "pixel_hash", 16: "phash"}  # hex digits of a line -> column
_BLOCK_NUMBERS = 2**22  # 32 MiB of distances at a time


def read_block_list(path: str) -> dict[str, np.ndarray]:
    """Column -> sorted distinct hashes, only for columns that occur.

    A line is a hash in hexadecimal, of either case: 64 digits are the sha256 of the image file, 32
    the pixel_hash and 16 the phash (highest bit first) of annotate/hashes. What stands behind a
    "#", and empty lines, are ignored.
    Raises ValueError for anything else, naming the line, and for a list without a hash.
    """
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            text = line.partition("#")[0].strip().lower()
            if not text:
                continue
            column = _COLUMNS.get(len(text))
            if column is None or set(text) - set("0123456789abcdef"):
                raise ValueError(
                    f"{path}, line {number}: {text[:70]!r} is no hash: need 64 hexadecimal digits "
                    "(sha256 of the file), 32 (pixel_hash) or 16 (phash)"
                )
            found.setdefault(column, []).append(text)
    if not found:
        raise ValueError(f"{path} holds no hash: set block_list to null if none is to be blocked")
    lists = {column: np.unique(texts) for column, texts in found.items() if column != "phash"}
    if "phash" in found:
        lists["phash"] = np.unique(np.array([int(text, 16) for text in found["phash"]], np.uint64))
    return lists


class Safety:
    """Drops what a block list names ("blocked_hash") and what a model scored as unsafe
    ("unsafe_score"); what has no score goes as "unscored". The first of these reasons counts.

    score_column: e.g. punsafe of annotate/external_scores; null: no score is looked at.
    threshold: a score at or above it is unsafe (LAION keeps below 0.5). It is compared in the
        score's own type, see select/clip_score.
    keep_unscored: true keeps pairs whose score is null or NaN. What is not known to be safe is not
        safe, so false.
    block_list: a file, see `read_block_list`; null: none. sha256 needs nothing, the others need
        annotate/hashes.
    max_phash_distance: bits, 0 to 64, in which a phash may differ from a listed one. Above about 8
        other pictures are hit too.
    Price: the list in memory; with phashes, pairs x hashes comparisons of 64 bits.
    """

    name = "safety"
    version = 1

    def __init__(
        self,
        *,
        score_column: str | None = "punsafe",
        threshold: float = 0.5,
        keep_unscored: bool = False,
        block_list: str | None = None,
        max_phash_distance: int = 0,
    ):
        if score_column is None and block_list is None:
            raise ValueError(
                "score_column=null and block_list=null: nothing to look at, set one of them"
            )
        if np.isnan(threshold):
            raise ValueError("threshold is NaN: no score would reach it")
        if not 0 <= max_phash_distance <= 64:
            raise ValueError(f"max_phash_distance {max_phash_distance} is outside [0, 64] bits")
        if block_list is not None and not Path(block_list).is_file():
            raise ValueError(
                f"block_list {block_list} does not exist: give a file of hashes, one a line, or "
                "null"
            )
        self.score_column, self.threshold = score_column, threshold
        self.keep_unscored = keep_unscored
        self.max_phash_distance = max_phash_distance
        self.inputs = {"block_list": block_list} if block_list else {}
        self.blocked = read_block_list(block_list) if block_list else {}
        self.reads = (*([score_column] if score_column else []), *sorted(self.blocked))

    def measure(self, part: pa.Table) -> None:
        """Nothing: each pair is judged alone."""

    def combine(self, measures: list[Any]) -> None:
        """Nothing."""

    def apply(self, part: pa.Table, combined: None, seed: int) -> pa.Array:
        """blocked_hash, unscored, unsafe_score, or null."""
        reasons = np.full(part.num_rows, None, object)
        if self.score_column is not None:
            scores = part[self.score_column].cast(pa.float64()).to_numpy(zero_copy_only=False)
            kind = np.dtype(part[self.score_column].type.to_pandas_dtype())
            limit = float(kind.type(self.threshold)) if kind.kind == "f" else self.threshold
            reasons[scores >= limit] = "unsafe_score"
            if not self.keep_unscored:
                reasons[np.isnan(scores)] = "unscored"
        for hit in self._hits(part):
            reasons[hit] = "blocked_hash"
        return pa.array(reasons, pa.string())

    def _hits(self, part: pa.Table) -> Iterator[np.ndarray]:
        """(rows,) bool for each kind of hash."""
        for column, blocked in self.blocked.items():
            known = part[column].is_valid().to_numpy()
            hit = np.zeros(part.num_rows, bool)
            values = part[column].filter(pa.array(known))
            if column == "phash":
                hit[known] = _near(values.to_numpy(), blocked, self.max_phash_distance)
            else:
                hit[known] = np.isin(np.asarray(values.to_pylist(), dtype=str), blocked)
            yield hit


def _near(hashes: np.ndarray, blocked: np.ndarray, distance: int) -> np.ndarray:
    """(N,) bool: whether a hash differs from one of `blocked` in at most `distance` bits."""
    if distance == 0:
        return np.isin(hashes, blocked)
    found = np.empty(len(hashes), bool)
    rows = max(1, _BLOCK_NUMBERS // len(blocked))
    for start in range(0, len(hashes), rows):
        apart = np.bitwise_count(hashes[start : start + rows, None] ^ blocked[None, :])
        found[start : start + rows] = (apart <= distance).any(axis=1)
    return found
