import numpy as np
import pyarrow as pa
import pytest

from curation.select import unit_vectors as module
from curation.select.unit_vectors import (
    embedded,
    gathered,
    nearest,
    normalised,
    read_labels,
    unit_vectors,
)


def column(rows):
    return pa.chunked_array([pa.array(rows, pa.list_(pa.float32()))])


def test_inner_products_are_exact():
    """Any order of summation and any blocks give the same number."""
    rng = np.random.default_rng(0)
    vectors = normalised(rng.normal(size=(60, 300)))
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6
    exact = vectors.astype(np.float64)
    assert np.array_equal(exact * 2**26, np.rint(exact * 2**26))
    whole = exact @ exact.T
    for order in (rng.permutation(300), rng.permutation(300)):
        assert np.array_equal(exact[:, order] @ exact[:, order].T, whole)
    assert np.array_equal((exact[:, None] * exact[None]).sum(-1), whole)
    rounded = rng.normal(size=(60, 300))  # not on the grid: it is the grid that does it
    rounded /= np.linalg.norm(rounded, axis=1, keepdims=True)
    order = rng.permutation(300)
    assert not np.array_equal(rounded[:, order] @ rounded[:, order].T, rounded @ rounded.T)


def test_rows_without_a_direction():
    rows = [[1, 0], None, [np.nan, 1], [0, 0], [np.inf, 1], [3, 4], [None, 1]]
    part = pa.table({"a": column(rows), "b": column([[1, 1]] * 5 + [None, [1, 1]])})
    assert embedded(part, ["a"]).tolist() == [True, False, False, False, False, True, False]
    assert embedded(part, ["a", "b"]).tolist() == [True] + [False] * 6
    assert embedded(part.slice(1, 1), ["a"]).tolist() == [False]
    good = part["a"].filter(pa.array(embedded(part, ["a"])))
    assert np.abs(unit_vectors(good, "a") - [[1, 0], [0.6, 0.8]]).max() < 1e-7


def test_widths_that_differ():
    part = pa.table({"a": column([[1, 0], [1, 0, 0]])})
    with pytest.raises(ValueError, match="a has vectors of widths"):
        embedded(part, ["a"])
    with pytest.raises(ValueError, match="widths"):
        gathered([np.ones((1, 2)), np.ones((1, 3))], np.arange(2), "a")


def test_gathered_puts_rows_in_their_places():
    found = gathered([np.ones((1, 2)), np.zeros((2, 2))], np.array([1, 2, 0]), "a")
    assert found.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_nearest_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, centres = normalised(rng.normal(size=(50, 6))), normalised(rng.normal(size=(5, 6)))
    centres[4] = centres[1]  # of equal ones the first
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 35)
    best, cosine = nearest(vectors, centres)
    products = vectors.astype(np.float64) @ centres.T.astype(np.float64)
    assert best.tolist() == products.argmax(1).tolist()
    assert 4 not in best
    assert np.array_equal(cosine, products.max(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [(np.ones(3), "need"), (np.zeros((2, 2)), "rows"), (np.full((2, 2), np.nan), "not finite")],
)
def test_bad_labels(tmp_path, content, message):
    np.save(tmp_path / "names.npy", content)
    with pytest.raises(ValueError, match=message):
        read_labels(str(tmp_path / "names.npy"))


def test_labels_of_another_kind():
    with pytest.raises(ValueError, match="need a .npy"):
        read_labels("names.txt")
