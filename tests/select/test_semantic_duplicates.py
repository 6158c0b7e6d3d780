import numpy as np
import pyarrow as pa
import pytest

from curation.select import semantic_duplicates
from curation.select.semantic_duplicates import SemanticDuplicates
from curation.select.unit_vectors import normalised


def pool(count=120, dim=8, seed=0):
    """Images, half of them near copies of the others, some of them exact; hexadecimal uids."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(count // 2, dim))
    noise = 0.1 * rng.normal(size=first.shape) * (np.arange(count // 2) % 4 > 0)[:, None]
    vectors = np.concatenate([first, first + noise]) * 3.0  # not of unit norm
    return vectors, [f"{value:08x}" for value in rng.permutation(count)]


def table(vectors, uids):
    rows = pa.array(np.asarray(vectors, np.float32).tolist(), pa.list_(pa.float32()))
    return pa.table({"uid": uids, "image_embed": rows})


def decide(selector, parts):
    combined = selector.combine([selector.measure(p) for p in parts])
    found = {}
    for p in parts:
        answer = selector.apply(p, combined, 0).to_pylist()
        found.update(zip(p["uid"].to_pylist(), answer, strict=True))
    return found


def gone(decisions):
    return {uid for uid, reason in decisions.items() if reason == "semantic_duplicate"}


def one_cluster(vectors, uids, epsilon, strict, keep):
    """By definition: pairwise cosines, the order by distance to the mean, ties by uid."""
    unit = normalised(vectors).astype(np.float64)
    mean = unit.sum(axis=0) / np.linalg.norm(unit.sum(axis=0))
    distance = (1 - (unit @ mean).astype(np.float32)).astype(np.float32)
    sign = -1 if keep == "hard" else 1
    order = sorted(range(len(uids)), key=lambda i: (sign * distance[i], uids[i]))
    out = set()
    for place, i in enumerate(order):
        nearest = max([0.0, *(float(unit[i] @ unit[j]) for j in order[:place])])
        if nearest > 1 - epsilon or (not strict and nearest == 1 - epsilon):
            out.add(uids[i])
    return out


@pytest.mark.parametrize("keep", ["hard", "easy"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 0.2])
def test_one_cluster_by_definition(keep, strict, epsilon):
    vectors, uids = pool()
    selector = SemanticDuplicates(epsilon=epsilon, strict=strict, keep=keep, num_clusters=1)
    found = gone(decide(selector, [table(vectors, uids)]))
    assert found == one_cluster(vectors, uids, epsilon, strict, keep)
    assert len(found) >= 15  # the exact copies


def test_strict_and_not():
    """Cosines that are exact: entries of 1/2."""
    vectors = np.array([[1, 1, 1, 1], [1, 1, 1, -1], [1, -1, -1, 1]]) * 0.5
    part = table(vectors, ["a", "b", "c"])
    for strict, expected in ((True, 0), (False, 1)):
        selector = SemanticDuplicates(epsilon=0.5, strict=strict, num_clusters=1)
        assert len(gone(decide(selector, [part]))) == expected


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_does_not_depend_on_parts_or_order(keep):
    vectors, uids = pool()
    selector = SemanticDuplicates(epsilon=0.02, keep=keep, num_clusters=4)
    whole = table(vectors, uids)
    shuffled = whole.take(np.random.default_rng(1).permutation(len(uids)))
    pieces = [shuffled.slice(0, 0), shuffled.slice(0, 7), shuffled.slice(7)]
    expected = decide(selector, [whole])
    assert decide(selector, pieces) == expected
    assert gone(expected)


def test_who_stays_differs_and_random_has_a_seed():
    vectors, uids = pool()
    found = {
        (keep, seed): gone(
            decide(
                SemanticDuplicates(epsilon=0.02, keep=keep, num_clusters=1, cluster_seed=seed),
                [table(vectors, uids)],
            )
        )
        for keep, seed in (("hard", 0), ("easy", 0), ("random", 0), ("random", 1))
    }
    assert len({frozenset(uids) for uids in found.values()}) == 4


def test_of_equal_images_the_smallest_uid_stays():
    uids = ["c", "a", "b"]
    for keep in ("hard", "easy"):
        selector = SemanticDuplicates(epsilon=0.01, keep=keep)
        assert gone(decide(selector, [table(np.ones((3, 4)), uids)])) == {"b", "c"}


def test_images_without_an_embedding():
    vectors, uids = pool(count=8)
    vectors[2] = np.nan
    vectors[3] = 0.0
    rows = table(vectors, uids).to_pylist()
    rows[5]["image_embed"] = None
    part = pa.Table.from_pylist(rows, schema=table(vectors, uids).schema)
    reasons = decide(SemanticDuplicates(epsilon=0.0), [part])
    missing = {uid for uid, reason in reasons.items() if reason == "missing_embed"}
    assert missing == {uids[2], uids[3], uids[5]}
    assert decide(SemanticDuplicates(), [part.slice(2, 1)]) == {uids[2]: "missing_embed"}
    assert decide(SemanticDuplicates(), [part.slice(0, 1)]) == {uids[0]: None}


def test_number_of_clusters_follows_the_pool(monkeypatch):
    """One per PAIRS_PER_CLUSTER, begun ones too."""
    asked = []
    kmeans = semantic_duplicates.spherical_kmeans

    def counted(vectors, *, num_classes, iterations, draws):
        asked.append(num_classes)
        return kmeans(vectors, num_classes=num_classes, iterations=iterations, draws=draws)

    monkeypatch.setattr(semantic_duplicates, "spherical_kmeans", counted)
    monkeypatch.setattr(semantic_duplicates, "PAIRS_PER_CLUSTER", 50)
    vectors, uids = pool()
    decide(SemanticDuplicates(), [table(vectors, uids)])
    assert asked == [3]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"epsilon": -0.1}, "epsilon -0.1"),
        ({"epsilon": 1.1}, "epsilon 1.1"),
        ({"epsilon": float("nan")}, "epsilon nan"),
        ({"keep": "soft"}, "hard, easy or random"),
        ({"num_clusters": 0}, "num_clusters=0"),
        ({"iterations": 0}, "iterations=0"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        SemanticDuplicates(**knobs)
