"""Duplicates: the exact ones as a selector, and the rule for near ones in embedding space
(SemDeDup, arXiv:2303.09540), which `semantic_duplicates` applies to a pool.

SemDeDup on LAION-440M, from its repository; half can go with little loss:
| epsilon | 0.00095 | 0.03 | 0.0395 | 0.07 | 0.083 | 0.124 | 0.165 | 0.205 | 0.26 |
|---|---|---|---|---|---|---|---|---|---|
| % kept | 79.6 | 72.1 | 70.2 | 63.4 | 60.2 | 49.9 | 39.8 | 30.5 | 19.8 |
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 1024  # columns of similarities at a time: memory is n_c x 1024, not n_c squared


def rank(
    *,
    similarity_to_centroid: np.ndarray,
    assignment: Sequence[int],
    keep: Literal["hard", "easy"],
    rule: Literal["semdedup", "curator"] = "semdedup",
) -> np.ndarray:
    """The order in which `removed` takes the items: cluster by cluster, those to keep first.

    similarity_to_centroid: (N,) cosine with the own cluster's centroid; its float32 distance 1 - s
        ranks. keep: "hard" takes the far ones first (SemDeDup's default), "easy" the near ones.
    rule: how equal distances go. Ascending id for hard in SemDeDup and easy in NeMo Curator,
        descending id for easy in SemDeDup (it reverses hard) and hard in NeMo Curator.
    """
    if keep not in ("hard", "easy") or rule not in ("semdedup", "curator"):
        raise ValueError(f"keep {keep!r}, rule {rule!r}: use hard or easy, semdedup or curator")
    distance = (1.0 - np.asarray(similarity_to_centroid, np.float32)).astype(np.float32)
    ids = np.arange(len(distance))
    ascending = (keep == "hard") == (rule == "semdedup")
    return np.lexsort(
        (ids if ascending else -ids, -distance if keep == "hard" else distance, assignment)
    )


def max_similarity(
    *,
    embeddings: np.ndarray,
    assignment: Sequence[int],
    order: Sequence[int],
    precision: type[np.floating] | None = None,
) -> np.ndarray:
    """Highest cosine of each item with the items before it in its cluster, at least 0; 0 for the
    first.

    embeddings: (N, D) unit norm.
    assignment: (N,) cluster of each item.
    order: every item id once; a cluster's items are taken in this order (clusters may interleave).
    precision: dtype of the products; None for the embeddings' own, float32 for halves. One cluster
        at a time is converted.
    Removed items still count as earlier ones (a column maximum, not leader clustering).
    Returns (N,) by item id.
    Raises ValueError if the lengths differ, order is not a permutation, or an embedding is not
        finite.
    Price: O(sum of n_c squared x D / 2); n_c x 1,024 similarities in memory.
    """
    embeddings, assignment, order = (
        np.asarray(embeddings),
        np.asarray(assignment),
        np.asarray(order),
    )
    if precision is None:
        precision = np.float32 if embeddings.dtype == np.float16 else embeddings.dtype
    count = len(embeddings)
    if len(assignment) != count or not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError(
            f"{count} embeddings, {len(assignment)} assignments, {len(order)} places in the "
            "order: need one assignment per item, and every item id once in the order"
        )
    highest = np.zeros(count, precision)
    by_cluster = order[np.argsort(assignment[order], kind="stable")]
    bounds = np.flatnonzero(np.diff(assignment[by_cluster])) + 1
    for members in np.split(by_cluster, bounds):
        items = embeddings[members].astype(precision, copy=False)
        if not np.isfinite(items).all():
            bad = np.sort(members[~np.isfinite(items).all(axis=1)])
            raise ValueError(
                f"embeddings {bad[:5].tolist()} are not finite: leave those items out before"
            )
        for start in range(0, len(members), _BLOCK):
            stop = min(start + _BLOCK, len(members))
            similarity = items[:stop] @ items[start:stop].T
            earlier = np.arange(stop)[:, None] < np.arange(start, stop)[None, :]
            similarity[~earlier] = 0.0
            highest[members[start:stop]] = np.maximum(similarity.max(axis=0), 0.0)
    return highest


def removed(
    *,
    embeddings: np.ndarray,
    assignment: Sequence[int],
    order: Sequence[int],
    epsilon: float,
    strict: bool,
    precision: type[np.floating] | None = None,
) -> np.ndarray:
    """Ascending ids of the items too close to an earlier one of their cluster; arguments as in
    `max_similarity`.

    epsilon: in [0, 1], distance within which two items are the same.
    strict: true removes where similarity > 1 - epsilon (SemDeDup), false where >= (NeMo Curator).
    order: decides who stays; SemDeDup's default takes what is far from the centroid first ("hard").
    """
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon {epsilon} is outside [0, 1]")
    highest = max_similarity(
        embeddings=embeddings, assignment=assignment, order=order, precision=precision
    )
    highest = highest.astype(np.float64)  # else numpy rounds the limit to float32 first
    limit = 1.0 - epsilon
    return np.flatnonzero(highest > limit if strict else highest >= limit).astype(np.int64)


class Duplicates:
    """Keeps one pair of all that agree in `columns`, the one with the smallest uid; drops the
    others ("duplicate").

    The smallest uid wins, so the choice does not depend on the pool's order or sharding (uids are
    content hashes: it is as good as random). Pairs with a null among the columns stay.
    columns: e.g. [sha256] (same file), [pixel_hash] (same pixels), [pixel_hash, caption], or [url,
        caption], what LAION removes.
    Price: one digest and one uid per pair in memory while combining.
    """

    name = "duplicates"
    version = 1

    def __init__(self, *, columns: Sequence[str]):
        if isinstance(columns, str) or not columns:
            raise ValueError(
                f"columns {columns!r}: need a list of column names, such as [sha256, caption]"
            )
        self.reads = tuple(columns)

    def _keys(self, part: pa.Table) -> list[bytes | None]:
        rows = zip(*(part[name].to_pylist() for name in self.reads), strict=True)
        return [None if None in row else _digest(row) for row in rows]

    def measure(self, part: pa.Table) -> pa.Table:
        """key, uid of the part's pairs that have a key."""
        table = pa.table({"key": pa.array(self._keys(part), pa.binary(16)), "uid": part["uid"]})
        return table.filter(pc.is_valid(table["key"]))

    def combine(self, measures: list[pa.Table]) -> dict[bytes, str]:
        """The winner's uid for every key that occurs more than once."""
        if not measures:
            return {}
        groups = (
            pa.concat_tables(measures).group_by("key").aggregate([("uid", "min"), ("uid", "count")])
        )
        repeated = groups.filter(pc.greater(groups["uid_count"], 1))
        return dict(zip(repeated["key"].to_pylist(), repeated["uid_min"].to_pylist(), strict=True))

    def apply(self, part: pa.Table, combined: dict[bytes, str], seed: int) -> pa.Array:
        reasons = [
            None if combined.get(key, uid) == uid else "duplicate"
            for key, uid in zip(self._keys(part), part["uid"].to_pylist(), strict=True)
        ]
        return pa.array(reasons, pa.string())


def _digest(row: tuple[Any, ...]) -> bytes:
    values = [str(value) for value in row]
    # the lengths keep ("ab", "c") apart from ("a", "bc")
    text = "".join(f"{len(value)}:{value}" for value in values)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
