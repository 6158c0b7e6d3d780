"""Clusters of unit vectors: the latent classes of selectors that need some."""

import numpy as np


def spherical_kmeans(
    vectors: np.ndarray, *, num_classes: int, iterations: int, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """k-means by cosine. vectors: (N, D) unit norm, float64.

    draws: (N,) a number for each row; the rows with the smallest ones that are not equal to each
        other start the classes, so a row's draw decides, not its place.
    Returns (assignment (N,) in [0, K), centroids (K, D) unit norm); K is smaller than num_classes
        if there are not as many different vectors. A class that loses all rows keeps its centroid.
        Stops early when nothing moves.
    """
    centroids = vectors[_starts(vectors, num_classes, draws)].copy()
    assignment = np.full(len(vectors), -1)
    for _ in range(iterations):
        nearest = np.argmax(vectors @ centroids.T, axis=1)
        if np.array_equal(nearest, assignment):
            break
        assignment = nearest
        for k in range(len(centroids)):
            total = vectors[assignment == k].sum(axis=0)
            norm = np.linalg.norm(total)
            if norm > 0:
                centroids[k] = total / norm
    return assignment, centroids


def _starts(vectors: np.ndarray, num_classes: int, draws: np.ndarray) -> list[int]:
    seen: set[bytes] = set()
    starts: list[int] = []
    for row in np.argsort(draws, kind="stable"):
        key = vectors[row].tobytes()
        if key not in seen:
            seen.add(key)
            starts.append(int(row))
        if len(starts) == num_classes:
            break
    return starts
