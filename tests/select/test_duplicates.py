import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.select import duplicates
from curation.select.duplicates import Duplicates, max_similarity, rank, removed


def brute_force(embeddings, assignment, order, epsilon, strict):
    gone = []
    for place, item in enumerate(order):
        earlier = [i for i in order[:place] if assignment[i] == assignment[item]]
        highest = max([0.0, *(float(embeddings[i] @ embeddings[item]) for i in earlier)])
        if highest > 1 - epsilon or (not strict and highest == 1 - epsilon):
            gone.append(item)
    return sorted(gone)


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(300, 6))
    embeddings[200:] = embeddings[:100] + 0.1 * rng.normal(size=(100, 6))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, rng.integers(0, 5, 300) * 3 - 2, rng.permutation(300)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.3, 1.0])
def test_equals_brute_force(cloud, epsilon, strict, monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 7)  # several blocks a cluster
    embeddings, assignment, order = cloud
    found = removed(
        embeddings=embeddings, assignment=assignment, order=order, epsilon=epsilon, strict=strict
    )
    assert found.dtype == np.int64
    assert found.tolist() == brute_force(embeddings, assignment, order.tolist(), epsilon, strict)


def test_exact_equality_and_column_maximum():
    a, b = np.array([1.0, 0.0]), np.array([0.5, 0.75**0.5])
    c = np.array([-0.5, 0.75**0.5])
    rule = {"assignment": [0, 0, 0], "order": [0, 1, 2]}
    chain = np.stack([a, b, c])  # a-b and b-c are 60 degrees, a-c 120
    # b goes because of a, and although it is gone, c goes because of b
    found = removed(embeddings=chain, epsilon=0.51, strict=True, **rule)
    assert found.tolist() == [1, 2]
    exact = np.array([[0.5] * 4, [0.5, 0.5, 0.5, -0.5]])
    rule = {"embeddings": exact, "assignment": [0, 0], "order": [1, 0], "epsilon": 0.5}
    assert removed(strict=True, **rule).tolist() == []
    assert removed(strict=False, **rule).tolist() == [0]


def test_half_precision_is_computed_in_single(cloud):
    embeddings, assignment, order = cloud
    rule = {"assignment": assignment, "order": order}
    half = max_similarity(embeddings=embeddings.astype(np.float16), **rule)
    assert half.dtype == np.float32
    assert np.abs(half - max_similarity(embeddings=embeddings, **rule)).max() < 2e-3


def test_rank_by_hand():
    rule = {"similarity_to_centroid": [0.5, 0.9, 0.5, 0.1], "assignment": [1, 1, 1, 0]}
    assert rank(keep="hard", **rule).tolist() == [3, 0, 2, 1]
    assert rank(keep="easy", **rule).tolist() == [3, 1, 2, 0]
    assert rank(keep="hard", rule="curator", **rule).tolist() == [3, 2, 0, 1]
    assert rank(keep="easy", rule="curator", **rule).tolist() == [3, 1, 0, 2]
    with pytest.raises(ValueError, match="use hard or easy"):
        rank(keep="random", **rule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": [0, 0]}, "every item id once"),
        ({"order": [0]}, "1 places"),
        ({"assignment": [0]}, "1 assignments"),
        ({"epsilon": 1.5}, "epsilon 1.5"),
    ],
)
def test_bad_input(change, message):
    rule = {"embeddings": np.eye(2), "assignment": [0, 0], "order": [0, 1], "epsilon": 0.1}
    with pytest.raises(ValueError, match=message):
        removed(strict=True, **(rule | change))


def decide(selector, rows, cuts=()):
    columns = ("uid", "sha256", "caption")
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
    bounds = [0, *cuts, len(rows)]
    parts = [table.slice(a, b - a) for a, b in itertools.pairwise(bounds)]
    combined = selector.combine([selector.measure(p) for p in parts])
    found = {}
    for p in parts:
        answer = selector.apply(p, combined, 0).to_pylist()
        found.update(zip(p["uid"].to_pylist(), answer, strict=True))
    return found


ROWS = [
    ("u5", "x", "dog"),
    ("u2", "x", "dog"),
    ("u3", "x", "cat"),
    ("u1", "y", "dog"),
    ("u4", None, "dog"),
    ("u0", None, "dog"),
]


@pytest.mark.parametrize(
    ("columns", "dropped"),
    [
        (["sha256"], {"u5", "u3"}),
        (["sha256", "caption"], {"u5"}),
        (["caption"], {"u1", "u2", "u4", "u5"}),
    ],
)
def test_smallest_uid_stays_whatever_the_order(columns, dropped):
    expected = {row[0]: "duplicate" if row[0] in dropped else None for row in ROWS}
    selector = Duplicates(columns=columns)
    assert decide(selector, ROWS) == expected
    assert decide(selector, ROWS[::-1], cuts=(1, 1, 4)) == expected


def test_keys_do_not_run_together():
    rows = [("u1", "ab", "c"), ("u2", "a", "bc")]
    assert set(decide(Duplicates(columns=["sha256", "caption"]), rows).values()) == {None}


@pytest.mark.parametrize("columns", [[], "sha256"])
def test_bad_columns(columns):
    with pytest.raises(ValueError, match="list of column names"):
        Duplicates(columns=columns)


def test_same_caption_under_the_same_url():
    """Nulls are never duplicates, not even of each other."""
    rows = [
        ("u1", "http://a/1.jpg", "dog"),
        ("u0", "http://a/1.jpg", "dog"),
        ("u2", "http://a/1.jpg", "a dog"),
        ("u3", "http://a/2.jpg", "dog"),
        ("u4", None, "dog"),
        ("u5", None, "dog"),
        ("u6", "http://a/1.jpg", None),
        ("u7", "http://a/1.jpg", None),
    ]
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(URL_COLUMNS)})
    selector = Duplicates(columns=["url", "caption"])
    combined = selector.combine(
        [selector.measure(table.slice(0, 1)), selector.measure(table.slice(1))]
    )
    found = selector.apply(table, combined, 0).to_pylist()
    assert [row[0] for row, reason in zip(rows, found, strict=True) if reason] == ["u1"]


URL_COLUMNS = ("uid", "url", "caption")


def test_embeddings_that_are_not_finite(cloud):
    embeddings, assignment, order = cloud
    embeddings[[7, 100]] = np.nan
    with pytest.raises(ValueError, match=r"embeddings \[.*\] are not finite"):
        removed(embeddings=embeddings, assignment=assignment, order=order, epsilon=0.1, strict=True)
    with pytest.raises(ValueError, match="epsilon nan"):
        removed(embeddings=np.eye(2), assignment=[0, 0], order=[0, 1], epsilon=np.nan, strict=True)


def test_precision_of_the_products(cloud):
    embeddings, assignment, order = cloud
    rule = {"assignment": assignment, "order": order}
    single = embeddings.astype(np.float32)
    found = max_similarity(embeddings=single, **rule, precision=np.float64)
    assert found.dtype == np.float64
    exact = max_similarity(embeddings=single.astype(np.float64), **rule)
    assert np.array_equal(found, exact)
