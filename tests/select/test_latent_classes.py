import numpy as np

from curation.select import latent_classes
from curation.select.latent_classes import class_means, spherical_kmeans
from curation.select.unit_vectors import normalised


def planted(count=90):
    rng = np.random.default_rng(0)
    truth = np.arange(count) % 3
    return normalised(np.eye(3, 8)[truth] + 0.05 * rng.normal(size=(count, 8))), truth


def test_finds_planted_clusters_and_their_means():
    vectors, truth = planted()
    draws = np.arange(90.0)  # rows 0, 1, 2 start, one of each cluster
    assignment, centroids = spherical_kmeans(vectors, num_classes=3, iterations=9, draws=draws)
    assert assignment.tolist() == truth.tolist()
    means = np.stack([vectors[truth == k].astype(np.float64).mean(axis=0) for k in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(centroids - means).max() < 1e-8  # 2^-27: they are on the grid too
    members = [np.flatnonzero(truth == k) for k in range(3)]
    assert np.abs(class_means(vectors, members) - means).max() < 1e-8


def test_starts_are_different_vectors():
    vectors = np.eye(4)[[0, 0, 0, 1, 1, 2]]
    assignment, centroids = spherical_kmeans(
        vectors, num_classes=5, iterations=3, draws=np.arange(6.0)
    )
    assert centroids.shape == (3, 4)
    assert assignment.tolist() == [0, 0, 0, 1, 1, 2]


def test_order_of_the_rows_changes_nothing():
    rng = np.random.default_rng(1)
    vectors, draws = normalised(rng.normal(size=(400, 6))), rng.uniform(size=400)
    order = rng.permutation(400)
    rule = {"num_classes": 7, "iterations": 5}
    assignment, centroids = spherical_kmeans(vectors, **rule, draws=draws)
    shuffled, again = spherical_kmeans(vectors[order], **rule, draws=draws[order])
    assert np.array_equal(centroids, again)
    assert np.array_equal(assignment[order], shuffled)


def test_fitted_to_a_sample(monkeypatch):
    """Of the smallest draws; everything is assigned."""
    monkeypatch.setattr(latent_classes, "POINTS_PER_CLASS", 10)
    vectors, truth = planted()
    vectors, truth = vectors[::-1], truth[::-1]
    draws = np.arange(90.0)[::-1]
    assignment, centroids = spherical_kmeans(vectors, num_classes=3, iterations=9, draws=draws)
    _, of_sample = spherical_kmeans(vectors[60:], num_classes=3, iterations=9, draws=draws[60:])
    assert np.array_equal(centroids, of_sample)
    assert assignment.tolist() == truth.tolist()
