"""Drop pairs whose caption disagrees with the image and with what the pair's neighbours say
(LEMoN, arXiv:2407.18941).

A proxy that was trained on the pool has memorised some of its wrong pairs, so their own CLIP score
is too high. Their
neighbours' are not: images like this one have other captions, captions like this one other images.
The score of a pair
(x, y) adds to cos(x, y) the mean similarity of y to the captions of the k images nearest to x, and
the mean similarity
of x to the images of the k captions nearest to y.

Our reading: cosine similarities without the paper's exponential weights, each of the three terms
standardised over the
pool, so that one weight serves any proxy. A pair with the same image bytes is no neighbour: it is
no second opinion.
Letters: N pairs, D embedding width, k neighbours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS_AT_ONCE = 1024  # rows of the N x N similarity in memory


def neighbour_agreement(
    own: np.ndarray, other: np.ndarray, groups: np.ndarray, *, num_neighbours: int
) -> np.ndarray:
    """(N,) mean cosine of other[i] with the `other` of the k rows nearest to i in `own`.

    own, other: (N, D) unit norm. groups: (N,) integers; rows of one group are not neighbours.
    0 where a row has no neighbour at all.
    """
    agreement = np.zeros(len(own), np.float64)
    k = min(num_neighbours, len(own) - 1)
    for start in range(0, len(own) if k else 0, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        similarity = own[rows] @ own.T
        similarity[groups[rows, None] == groups[None]] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        valid = np.isfinite(np.take_along_axis(similarity, nearest, axis=1))
        cosines = np.einsum("nkd,nd->nk", other[nearest], other[rows])
        agreement[rows] = (cosines * valid).sum(1) / np.maximum(valid.sum(1), 1)
    return agreement


def standardised(values: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance; all zero where they do not vary."""
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def scores(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    groups: np.ndarray,
    *,
    num_neighbours: int,
    neighbour_weight: float,
) -> np.ndarray:
    """(N,) float64, larger is better: the standardised cosine + weight * the two agreements."""
    cosine = np.einsum("nd,nd->n", image_embed, text_embed).astype(np.float64)
    by_image = neighbour_agreement(image_embed, text_embed, groups, num_neighbours=num_neighbours)
    by_text = neighbour_agreement(text_embed, image_embed, groups, num_neighbours=num_neighbours)
    agreements = standardised(by_image) + standardised(by_text)
    return standardised(cosine) + neighbour_weight * agreements


class Neighbours:
    """fraction: share of the pairs with an embedding that stays, int(N * fraction); ties go by uid.

    num_neighbours: k. neighbour_weight: 0 is the CLIP score alone.
    Reasons: neighbours, missing_embed (null or not finite). Price: N^2 D multiplications and all
    embeddings in memory;
    run it on what other steps left, and on clusters above some hundred thousand pairs.
    """

    name, version = "neighbours", 1
    reads = ("image_embed", "text_embed", "sha256")

    def __init__(self, *, fraction: float, num_neighbours: int = 5, neighbour_weight: float = 1.0):
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction {fraction} is outside (0, 1]")
        if num_neighbours < 1 or neighbour_weight < 0:
            raise ValueError(
                f"num_neighbours={num_neighbours} must be at least 1 and "
                f"neighbour_weight={neighbour_weight} not negative"
            )
        self.fraction = fraction
        self.num_neighbours, self.neighbour_weight = num_neighbours, neighbour_weight

    def measure(self, part: pa.Table) -> pa.Table:
        """The rows that have both embeddings."""
        return part.filter(pa.array(_embedded(part), pa.bool_()))

    def combine(self, measures: list[Any]) -> frozenset[str]:
        """The uids that go."""
        # by uid: sums and ties may not depend on how the pool was cut
        table = pa.concat_tables(measures).sort_by("uid").combine_chunks()
        if not table.num_rows:
            return frozenset()
        image_embed, text_embed = (
            _unit(table[name].to_pylist()) for name in ("image_embed", "text_embed")
        )
        groups = pc.dictionary_encode(table["sha256"]).combine_chunks().indices.to_numpy()
        score = scores(
            image_embed,
            text_embed,
            groups,
            num_neighbours=self.num_neighbours,
            neighbour_weight=self.neighbour_weight,
        )
        order = np.argsort(-score, kind="stable")
        uids = table["uid"].to_pylist()
        return frozenset(uids[i] for i in order[int(len(order) * self.fraction) :])

    def apply(self, part: pa.Table, combined: frozenset[str], seed: int) -> pa.Array:
        """neighbours, missing_embed, or null."""
        reasons = [
            "missing_embed" if not good else "neighbours" if uid in combined else None
            for uid, good in zip(part["uid"].to_pylist(), _embedded(part), strict=True)
        ]
        return pa.array(reasons, pa.string())


def _embedded(part: pa.Table) -> list[bool]:
    """Whether a row has two finite embeddings."""
    return [
        all(vector is not None and bool(np.isfinite(vector).all()) for vector in pair)
        for pair in zip(
            part["image_embed"].to_pylist(), part["text_embed"].to_pylist(), strict=True
        )
    ]


def _unit(vectors: Sequence[Sequence[float]]) -> np.ndarray:
    """(N, D) float32 of unit norm."""
    array = np.asarray(vectors, np.float32)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
