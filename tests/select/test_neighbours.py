"""The agreement of neighbours against a brute force, and what it is for."""

import numpy as np
import pyarrow as pa
import pytest

from curation.select.neighbours import Neighbours, neighbour_agreement, scores


def unit(rng, count, width=6):
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(own, other, groups, k):
    result = []
    for i in range(len(own)):
        others = [j for j in range(len(own)) if groups[j] != groups[i]]
        nearest = sorted(others, key=lambda j: -float(own[i] @ own[j]))[:k]
        cosines = [float(other[i] @ other[j]) for j in nearest]
        result.append(np.mean(cosines) if cosines else 0.0)
    return np.array(result)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_agreement_is_the_brute_force(k, monkeypatch):
    monkeypatch.setattr("curation.select.neighbours.ROWS_AT_ONCE", 7)  # several blocks, one ragged
    rng = np.random.default_rng(0)
    own, other, groups = unit(rng, 40), unit(rng, 40), rng.integers(0, 25, 40)
    found = neighbour_agreement(own, other, groups, num_neighbours=k)
    np.testing.assert_allclose(found, brute_force(own, other, groups, k), atol=1e-6)


def test_pairs_of_one_image_have_no_second_opinion():
    vectors = unit(np.random.default_rng(0), 4)
    same = np.zeros(4, np.int64)
    assert (neighbour_agreement(vectors, vectors, same, num_neighbours=2) == 0).all()


def memorised_pool():
    """Ten concepts of ten pairs; 15 captions are of another concept, and the proxy learnt them by
    heart.
    """
    rng = np.random.default_rng(1)
    concepts = unit(rng, 10, 16)
    images = np.repeat(concepts, 10, axis=0) + 0.1 * rng.normal(size=(100, 16))
    texts = np.repeat(concepts, 10, axis=0) + 0.1 * rng.normal(size=(100, 16))
    wrong = rng.choice(100, 15, replace=False)
    texts[wrong] = texts[(wrong + 50) % 100]
    texts[wrong] += 0.9 * images[wrong]  # memorised: close to its image, whatever it says
    images, texts = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (images, texts))
    return images.astype(np.float32), texts.astype(np.float32), wrong


def table(images, texts, uids=None):
    return pa.table(
        {
            "uid": uids or [f"{n:03d}" for n in range(len(images))],
            "image_embed": pa.array(list(images), pa.list_(pa.float32())),
            "text_embed": pa.array(list(texts), pa.list_(pa.float32())),
            "sha256": [str(n) for n in range(len(images))],
        }
    )


def decide(selector, parts):
    combined = selector.combine([selector.measure(part) for part in parts])
    return {
        uid: reason
        for part in parts
        for uid, reason in zip(
            part["uid"].to_pylist(), selector.apply(part, combined, 0).to_pylist(), strict=True
        )
    }


def test_neighbours_find_wrong_pairs_that_were_memorised():
    images, texts, wrong = memorised_pool()

    def caught(weight):
        score = scores(images, texts, np.arange(100), num_neighbours=5, neighbour_weight=weight)
        return len(set(np.argsort(score)[:15]) & set(wrong))

    assert caught(1.0) >= 14
    assert caught(1.0) > caught(0.0)


def test_the_decision_does_not_depend_on_parts_or_order():
    images, texts, _ = memorised_pool()
    whole = table(images, texts)
    selector = Neighbours(fraction=0.8)
    expected = decide(selector, [whole])
    assert sum(reason == "neighbours" for reason in expected.values()) == 20
    turned = whole.take(pa.array(np.random.default_rng(0).permutation(100)))
    assert (
        decide(selector, [turned.slice(0, 33), turned.slice(33, 0), turned.slice(33)]) == expected
    )


def test_missing_embeddings_are_counted_and_the_rest_decided():
    images, texts, _ = memorised_pool()
    rows = table(images[:10], texts[:10]).to_pylist()
    rows[3]["image_embed"] = None
    rows[4]["text_embed"] = [float("nan")] * 16
    part = pa.Table.from_pylist(rows, schema=table(images, texts).schema)
    reasons = decide(Neighbours(fraction=0.5), [part])
    assert [uid for uid, reason in reasons.items() if reason == "missing_embed"] == ["003", "004"]
    assert sum(reason == "neighbours" for reason in reasons.values()) == 4
    assert decide(Neighbours(fraction=0.5), [part.slice(0, 0)]) == {}


@pytest.mark.parametrize("knobs", [{"fraction": 0}, {"fraction": 0.5, "num_neighbours": 0}])
def test_knobs_out_of_range_are_named(knobs):
    with pytest.raises(ValueError, match=list(knobs)[-1]):
        Neighbours(**knobs)
