"""Clusters of unit vectors: the latent classes of selectors that need some.

Vectors lie on the grid of `unit_vectors`, so that the clusters depend on which rows there are and
not on their order, on blocks or on threads. Letters: N rows, D width, K classes.
"""

import numpy as np

from curation.select.unit_vectors import nearest, on_grid

# faiss's default: more points change the centroids little, and their number bounds the price
POINTS_PER_CLASS = 256


def spherical_kmeans(
    vectors: np.ndarray, *, num_classes: int, iterations: int, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """k-means by cosine. vectors: (N, D) unit norm.

    draws: (N,) a number for each row; the rows with the smallest ones that are not equal to each
        other start the classes, so a row's draw decides, not its place. The centroids are fitted to
        the POINTS_PER_CLASS * num_classes rows of the smallest draws, then all rows are assigned.
    Returns (assignment (N,) in [0, K), centroids (K, D) float64 of unit norm); K is smaller than
        num_classes if there are not as many different vectors. A class that loses all rows keeps
        its centroid. Stops early when nothing moves.
    Price: min(N, 256 K) K D a round, N K D once at the end.
    """
    by_draw = np.argsort(draws, kind="stable")
    centroids = vectors[_starts(vectors, num_classes, by_draw)].astype(np.float64)
    centroids = on_grid(centroids)
    sample = vectors[np.sort(by_draw[: POINTS_PER_CLASS * num_classes])]
    assignment = np.full(len(sample), -1)
    for _ in range(iterations):
        found, _ = nearest(sample, centroids)
        if np.array_equal(found, assignment):
            break
        assignment = found
        _move(centroids, sample, assignment)
    return nearest(vectors, centroids)[0], centroids


def class_means(vectors: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """(K, D) float64 on the grid: the direction of each class's mean; 0 where it has none."""
    means = np.zeros((len(members), vectors.shape[1]))
    for k, rows in enumerate(members):
        total = vectors[rows].sum(axis=0, dtype=np.float64)
        means[k] = total / max(float(np.linalg.norm(total)), 1e-12)
    return on_grid(means)


def _move(centroids: np.ndarray, vectors: np.ndarray, assignment: np.ndarray) -> None:
    order = np.argsort(assignment, kind="stable")
    bounds = np.searchsorted(assignment[order], np.arange(len(centroids) + 1))
    for k in range(len(centroids)):
        rows = order[bounds[k] : bounds[k + 1]]
        total = vectors[rows].sum(axis=0, dtype=np.float64)  # exact: multiples of 2^-26
        norm = np.linalg.norm(total)
        if norm > 0:
            centroids[k] = on_grid(total / norm)


def _starts(vectors: np.ndarray, num_classes: int, by_draw: np.ndarray) -> list[int]:
    seen: set[bytes] = set()
    starts: list[int] = []
    for row in by_draw:
        key = vectors[row].tobytes()
        if key not in seen:
            seen.add(key)
            starts.append(int(row))
        if len(starts) == num_classes:
            break
    return starts
