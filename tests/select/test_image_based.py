import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.select.image_based import ImageBased


@pytest.fixture
def files(tmp_path):
    def files(centroids, reference):
        paths = {"centroids": tmp_path / "centroids.npy", "reference": tmp_path / "reference.npy"}
        np.save(paths["centroids"], centroids)
        np.save(paths["reference"], reference)
        return {knob: str(path) for knob, path in paths.items()}

    return files


def table(vectors):
    width = pa.list_(pa.float32())
    columns = {
        "uid": pa.array([f"{i:04x}" for i in range(len(vectors))]),
        "image_embed": pa.array([v if v is None else list(map(float, v)) for v in vectors], width),
    }
    return pa.table(columns)


def decide(selector, whole, cuts=()):
    bounds = [0, *cuts, len(whole)]
    parts = [whole.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
    combined = selector.combine([selector.measure(part) for part in parts])
    return [r for part in parts for r in selector.apply(part, combined, 0).to_pylist()]


def datacomp(images, centroids, reference):
    """argmax of inner products with the centroids as they are, of both sides."""
    wanted = {int(np.argmax(centroids @ x)) for x in reference}
    return [int(np.argmax(centroids @ x)) in wanted for x in images]


def test_equals_the_definition(files):
    rng = np.random.default_rng(0)
    # like means of unit vectors: norms between 0.3 and 1 that decide as much as directions
    centroids = rng.normal(size=(50, 16))
    centroids *= rng.uniform(0.3, 1.0, (50, 1)) / np.linalg.norm(centroids, axis=1, keepdims=True)
    images = rng.normal(size=(2000, 16)).astype(np.float32)
    reference = rng.normal(size=(12, 16)) * 7.0  # of any norm
    selector = ImageBased(**files(centroids.astype(np.float32), reference.astype(np.float32)))
    found = decide(selector, table(images))
    expected = datacomp(images, centroids, reference)
    assert [reason is None for reason in found] == expected
    assert set(found) == {None, "far_image"}
    directions = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    assert expected != datacomp(images, directions, reference)  # the norms matter
    assert decide(selector, table(images), cuts=(0, 1, 777)) == found


def test_ties_go_to_the_first_centroid(files):
    two = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    selector = ImageBased(**files(two, np.array([[0.5, 0.1]])))
    assert decide(selector, table([[3, 0], [1, 1], [0, 1]])) == [None, None, "far_image"]


def test_images_without_a_vector(files):
    selector = ImageBased(**files(np.eye(2), np.array([[1.0, 0.0]])))
    vectors = [None, [float("nan"), 1], [0, 0], [1, 0]]
    assert decide(selector, table(vectors)) == ["no_embedding"] * 3 + [None]
    assert decide(selector, table(vectors[:2])) == ["no_embedding"] * 2
    assert decide(selector, table([])) == []


def test_missing_and_bad_files(files, tmp_path):
    good = files(np.eye(3), np.eye(3))
    for knob in good:
        with pytest.raises(ValueError, match=f"{knob} .*none.npy does not exist"):
            ImageBased(**(good | {knob: str(tmp_path / "none.npy")}))
    for centroids, reference, message in (
        (np.eye(3), np.ones(3), r"shape \(3,\)"),
        (np.eye(3), np.array([["a"]]), "need \\(rows, width\\)"),
        (np.zeros((2, 3)), np.eye(3), r"rows \[0, 1\] are zero"),
        (np.eye(3), np.full((1, 3), np.nan), "not finite"),
        (np.eye(3), np.eye(2), "has width 3, .* has 2"),
        (np.eye(2), np.eye(2), "image_embed has width 3"),
    ):
        with pytest.raises(ValueError, match=message):
            decide(ImageBased(**files(centroids, reference)), table(np.eye(3)))
    text = tmp_path / "vectors.csv"
    text.write_text("1")
    with pytest.raises(ValueError, match="need a .npy"):
        decide(ImageBased(**(good | {"reference": str(text)})), table(np.eye(3)))
