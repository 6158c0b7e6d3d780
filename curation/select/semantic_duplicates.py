"""Near duplicates by meaning: SemDeDup (arXiv:2303.09540) on image embeddings.

Clusters by spherical k-means; in each, the images are taken in an order, and one goes if an earlier
one of its cluster is closer than epsilon (`curation.select.duplicates.removed`, with the paper's
table). Similarities are exact (see `unit_vectors`): what goes does not depend on parts or threads.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from curation.select.duplicates import rank, removed
from curation.select.latent_classes import spherical_kmeans
from curation.select.unit_vectors import embedded, gathered, unit_vectors
from curation.step import uniform

PAIRS_PER_CLUSTER = 8_800  # SemDeDup: LAION-440M in 50,000 clusters


class SemanticDuplicates:
    """Drops images too close to an earlier one of their cluster ("semantic_duplicate"), and pairs
    without an embedding ("missing_embed": null, not finite or zero).

    epsilon: in [0, 1], the cosine distance within which two are the same; it belongs to the proxy.
    strict: true where similarity > 1 - epsilon goes (SemDeDup), false where >= (NeMo Curator). A
        vector's similarity to itself is 1 up to 1e-7: below 1e-6 epsilon is left to chance.
    keep: who comes first and stays: "hard" far from the centroid (SemDeDup), "easy" near, "random"
        by a draw from (cluster_seed, uid). Equal distances go by ascending uid.
    num_clusters: null for one per 8,800 images, as in SemDeDup; duplicates in different clusters
        are not found, so fewer clusters find more and cost more.
    iterations, cluster_seed: of k-means.
    Price: N^2 D / num_clusters multiplications; all embeddings in memory (float32, twice while they
        are gathered), similarities in blocks.
    """

    name = "semantic_duplicates"
    version = 1
    reads = ("image_embed",)

    def __init__(
        self,
        *,
        epsilon: float = 0.05,
        strict: bool = True,
        keep: Literal["hard", "easy", "random"] = "hard",
        num_clusters: int | None = None,
        iterations: int = 20,
        cluster_seed: int = 0,
    ):
        if not 0.0 <= epsilon <= 1.0:
            raise ValueError(f"epsilon {epsilon} is outside [0, 1]: SemDeDup uses 0.03 to 0.2")
        if keep not in ("hard", "easy", "random"):
            raise ValueError(f"unknown keep {keep!r}: use hard, easy or random")
        if (num_clusters is not None and num_clusters < 1) or iterations < 1:
            raise ValueError(
                f"iterations={iterations}, num_clusters={num_clusters}: need at least 1 of each"
            )
        self.epsilon, self.strict, self.keep = epsilon, strict, keep
        self.num_clusters, self.iterations = num_clusters, iterations
        self.cluster_seed = cluster_seed

    def measure(self, part: pa.Table) -> dict[str, np.ndarray]:
        """uid and image embedding, float32 of unit norm, of the pairs that have one."""
        complete = part.filter(pa.array(embedded(part, self.reads)))
        return {
            "uid": np.asarray(complete["uid"].to_pylist(), dtype=str),
            "image_embed": unit_vectors(complete["image_embed"], "image_embed"),
        }

    def combine(self, measures: list[dict[str, Any]]) -> frozenset[str]:
        """The uids that go."""
        measures = [measure for measure in measures if len(measure["uid"])]
        if not measures:
            return frozenset()
        uid = np.concatenate([measure["uid"] for measure in measures])
        by_uid = np.argsort(uid, kind="stable")
        uid = uid[by_uid]
        places = np.empty(len(uid), np.int64)
        places[by_uid] = np.arange(len(uid))
        vectors = gathered([m["image_embed"] for m in measures], places, "image_embed")
        assignment, centroids = spherical_kmeans(
            vectors,
            num_classes=self.num_clusters or -(-len(uid) // PAIRS_PER_CLUSTER),
            iterations=self.iterations,
            draws=uniform(self.cluster_seed, self.name, uid.tolist()),
        )
        gone = removed(
            embeddings=vectors,
            assignment=assignment,
            order=self._order(uid, vectors, assignment, centroids),
            epsilon=self.epsilon,
            strict=self.strict,
            precision=np.float64,
        )
        return frozenset(uid[gone].tolist())

    def _order(
        self, uid: np.ndarray, vectors: np.ndarray, assignment: np.ndarray, centroids: np.ndarray
    ) -> np.ndarray:
        if self.keep == "random":
            draws = uniform(self.cluster_seed, f"{self.name}/order", uid.tolist())
            return np.argsort(draws, kind="stable")
        own = np.empty(len(vectors))
        for k, centroid in enumerate(centroids):
            rows = assignment == k
            own[rows] = vectors[rows].astype(np.float64) @ centroid
        # the one that puts the smaller uid first among equal distances
        rule = "semdedup" if self.keep == "hard" else "curator"
        return rank(similarity_to_centroid=own, assignment=assignment, keep=self.keep, rule=rule)

    def apply(self, part: pa.Table, combined: frozenset[str], seed: int) -> pa.Array:
        """semantic_duplicate, missing_embed, or null."""
        reasons = [
            "missing_embed" if not good else "semantic_duplicate" if uid in combined else None
            for uid, good in zip(part["uid"].to_pylist(), embedded(part, self.reads), strict=True)
        ]
        return pa.array(reasons, pa.string())
