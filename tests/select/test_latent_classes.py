import numpy as np

from curation.select.latent_classes import spherical_kmeans


def test_finds_planted_clusters_and_their_means():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    truth = np.arange(90) % 3
    vectors = centres[truth] + 0.05 * rng.normal(size=(90, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    draws = np.arange(90.0)  # rows 0, 1, 2 start, one of each cluster
    assignment, centroids = spherical_kmeans(vectors, num_classes=3, iterations=9, draws=draws)
    assert assignment.tolist() == truth.tolist()
    means = np.stack([vectors[truth == k].mean(axis=0) for k in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(centroids - means).max() < 1e-12


def test_starts_are_different_vectors():
    vectors = np.eye(4)[[0, 0, 0, 1, 1, 2]]
    assignment, centroids = spherical_kmeans(
        vectors, num_classes=5, iterations=3, draws=np.arange(6.0)
    )
    assert centroids.shape == (3, 4)
    assert assignment.tolist() == [0, 0, 0, 1, 1, 2]
