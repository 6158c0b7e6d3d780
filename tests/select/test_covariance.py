import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.select import covariance_greedy
from curation.select.covariance import Covariance, select


def brute_force(similarity, raw, label_similarity, centre_terms, fraction, variant, period):
    """All scores from their definition after every pick; no queue, no vectors kept up to date."""
    members = [(k, i) for k, matrix in enumerate(similarity) for i in range(len(matrix))]
    picks, known = [[] for _ in similarity], [[] for _ in similarity]  # known: [(new, all)]

    def score(k, i):
        s, n = similarity[k], len(similarity[k])
        value = raw[k][i] + 2 * s[i, i] + label_similarity[k][i] / 2 - centre_terms[k][i]
        for new, everything in known[k]:
            value -= sum(max(s[i, j], 0) + max(s[j, i], 0) for j in new) / n
            value -= sum(raw[k][j] for j in everything) / n
            value -= sum(label_similarity[k][j] for j in new) / 2 / n
        return value

    chosen = []
    for _ in range(int(len(members) * fraction)):
        remaining = [(k, i) for k, i in members if i not in picks[k]]
        k, i = max(remaining, key=lambda member: score(*member))
        chosen.append(members.index((k, i)))
        picks[k].append(i)
        seen = known[k][-1][1] if known[k] else []
        new = picks[k][len(seen) :] if variant == "notebook" else [i]
        if variant == "paper":
            known[k].append((new, new))
        elif (len(picks[k]) + 1) % period == 0:
            known[k].append((new, list(picks[k])))
    return chosen


@pytest.fixture
def terms():
    rng = np.random.default_rng(0)
    sizes = (14, 1, 9)
    return {
        "similarity": [rng.uniform(-0.5, 1, (n, n)) for n in sizes],
        "raw": [rng.uniform(0, 1, n) for n in sizes],
        "label_similarity": [rng.uniform(0, 1, n) for n in sizes],
        "centre_terms": [rng.uniform(0, 1, n) for n in sizes],
    }


@pytest.mark.parametrize("variant", ["paper", "notebook"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8, 1.0])
def test_equals_brute_force(terms, fraction, variant, monkeypatch):
    monkeypatch.setattr(covariance_greedy, "PERIOD", 4)  # updates at picks 3, 7, 11 of a class
    found = select(**terms, fraction=fraction, variant=variant)
    assert found.dtype == np.int64
    assert found.tolist() == brute_force(**terms, fraction=fraction, variant=variant, period=4)


def test_variants_differ_and_without_updates_it_is_top_k(terms, monkeypatch):
    static = np.concatenate(
        [
            raw + 2 * np.diagonal(s) + label / 2 - centre
            for s, raw, label, centre in zip(*terms.values(), strict=True)
        ]
    )
    notebook = select(**terms, fraction=1.0, variant="notebook")
    assert notebook.tolist() == np.argsort(-static).tolist()
    assert notebook.tolist() != select(**terms, fraction=1.0, variant="paper").tolist()
    monkeypatch.setattr(covariance_greedy, "PERIOD", 3)
    assert notebook.tolist() != select(**terms, fraction=1.0, variant="notebook").tolist()


def test_flat_arrays_are_the_classes_one_after_the_other(terms):
    flat = {name: np.concatenate(terms[name]) for name in list(terms)[1:]}
    found = select(similarity=terms["similarity"], **flat, fraction=0.7, variant="paper")
    assert found.tolist() == select(**terms, fraction=0.7, variant="paper").tolist()


def test_ties_go_to_the_smallest_id():
    ones = [np.ones((3, 3))] * 2
    nothing = [np.zeros(3)] * 2
    found = select(
        similarity=ones,
        raw=nothing,
        label_similarity=nothing,
        centre_terms=nothing,
        fraction=1.0,
        variant="notebook",
    )
    assert found.tolist() == [0, 1, 2, 3, 4, 5]


def test_empty_classes_and_empty_input(terms):
    found = select(**terms, fraction=1.0, variant="paper")
    padded = {
        name: [parts[0], np.empty((0, 0) if name == "similarity" else 0), *parts[1:]]
        for name, parts in terms.items()
    }
    assert select(**padded, fraction=1.0, variant="paper").tolist() == found.tolist()
    nothing = {name: [] for name in terms}
    assert select(**nothing, fraction=1.0, variant="paper").tolist() == []


def test_numbers_that_are_not_finite(terms):
    for name in ("raw", "label_similarity", "centre_terms", "similarity"):
        spoiled = [np.array(part) for part in terms[name]]
        spoiled[0][3] = np.nan
        with pytest.raises(ValueError, match=r"not finite|NaN"):
            select(**(terms | {name: spoiled}), fraction=1.0, variant="paper")
    spoiled = [matrix.copy() for matrix in terms["similarity"]]
    spoiled[0][3, 4] = np.nan  # off the diagonal
    with pytest.raises(ValueError, match="similarity holds NaN"):
        select(**(terms | {"similarity": spoiled}), fraction=1.0, variant="paper")


def test_bad_input(terms):
    with pytest.raises(ValueError, match="use paper or notebook"):
        select(**terms, fraction=0.5, variant="fixed")
    with pytest.raises(ValueError, match=r"fraction 1\.5"):
        select(**terms, fraction=1.5, variant="paper")
    with pytest.raises(ValueError, match="raw has shapes"):
        select(**(terms | {"raw": terms["raw"][:2]}), fraction=0.5, variant="paper")
    with pytest.raises(ValueError, match="square matrix"):
        select(**(terms | {"similarity": [np.zeros((2, 3))]}), fraction=0.5, variant="paper")


def embeddings(seed=0, count=240, topics=4, dim=16):
    """Pairs around topics; the last quarter has the image of another topic."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(dim, topics)))[0].T
    topic = rng.integers(0, topics, count)
    shown = np.where(np.arange(count) < 3 * count // 4, topic, (topic + 1) % topics)
    vectors = [centres[t] + 0.15 * rng.normal(size=(count, dim)) for t in (shown, topic)]
    image, text = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    return image, text, [f"{value:032x}" for value in rng.permutation(count)]


def table(image, text, uids):
    kind = pa.list_(pa.float32(), image.shape[1])
    columns = {"image_embed": image, "text_embed": text}
    arrays = {k: pa.array(v.astype(np.float32).tolist(), kind) for k, v in columns.items()}
    return pa.table({"uid": uids, **arrays})


def decide(selector, parts):
    combined = selector.combine([selector.measure(p) for p in parts])
    found = {}
    for p in parts:
        answer = selector.apply(p, combined, 0).to_pylist()
        found.update(zip(p["uid"].to_pylist(), answer, strict=True))
    return found


@pytest.mark.parametrize("variant", ["paper", "notebook"])
def test_mismatched_pairs_go_first(variant):
    image, text, uids = embeddings()
    selector = Covariance(fraction=0.7, variant=variant, num_classes=4)
    reasons = decide(selector, [table(image, text, uids)])
    kept = [reasons[uid] is None for uid in uids]
    assert sum(kept) == int(240 * 0.7)
    assert sum(kept[180:]) < 0.1 * 60  # 0.7 by chance
    assert set(reasons.values()) == {None, "covariance"}


def test_does_not_depend_on_parts_or_order():
    image, text, uids = embeddings()
    selector = Covariance(fraction=0.5, num_classes=5)
    whole = table(image, text, uids)
    shuffled = whole.take(np.random.default_rng(1).permutation(240))
    pieces = [shuffled.slice(0, 0), shuffled.slice(0, 7), shuffled.slice(7)]
    assert decide(selector, pieces) == decide(selector, [whole])


def test_equal_pairs_go_by_uid():
    image, text, _ = embeddings(count=1)
    uids = [f"{value:032x}" for value in range(10)]
    whole = table(np.repeat(image, 10, axis=0), np.repeat(text, 10, axis=0), uids)
    for order in (np.arange(10), np.arange(10)[::-1]):
        reasons = decide(Covariance(fraction=0.5, num_classes=2), [whole.take(order)])
        assert {uid for uid, reason in reasons.items() if reason is None} == set(uids[:5])


def test_pairs_without_embeddings():
    image, text, uids = embeddings(count=8)
    image[3] = np.nan
    rows = table(image, text, uids).to_pylist()
    rows[5]["text_embed"] = None
    part = pa.Table.from_pylist(rows, schema=table(image, text, uids).schema)
    reasons = decide(Covariance(fraction=1.0, num_classes=2), [part])
    assert {uid for uid, reason in reasons.items() if reason} == {uids[3], uids[5]}
    assert reasons[uids[3]] == "missing_embed"
    assert decide(Covariance(fraction=1.0), [part.slice(3, 1)]) == {uids[3]: "missing_embed"}


def test_all_of_nothing_and_of_everything():
    image, text, uids = embeddings(count=30)
    whole = table(image, text, uids)
    assert set(decide(Covariance(fraction=1.0), [whole]).values()) == {None}
    assert set(decide(Covariance(fraction=0.0), [whole]).values()) == {"covariance"}
    assert decide(Covariance(fraction=0.5), [whole.slice(0, 0)]) == {}


def test_memory_does_not_change_the_answer():
    image, text, uids = embeddings(count=300)
    whole = table(image, text, uids)
    found = [
        decide(Covariance(fraction=0.4, num_classes=2, memory_gib=gib), [whole])
        for gib in (1.0, 1e-6)
    ]
    assert found[0] == found[1]


def test_classes_of_a_column():
    """Pairs of one class compete with each other alone; a class of one, and rows without one."""
    image, text, uids = embeddings(count=41)
    names = ["b", "a"] * 20 + ["alone"]
    names[7] = None
    whole = table(image, text, uids).append_column("topic", pa.array(names))
    selector = Covariance(fraction=0.5, num_classes=None, class_column="topic")
    assert selector.reads == ("image_embed", "text_embed", "topic")
    reasons = decide(selector, [whole.slice(0, 5), whole.slice(5)])
    assert reasons[uids[7]] == "missing_class"
    assert sum(reason is None for reason in reasons.values()) == 20
    renamed = {"a": 3, "alone": 1, "b": 2}  # another order of the classes
    numbers = pa.array([renamed.get(name) for name in names], pa.int32())
    again = whole.drop(["topic"]).append_column("topic", numbers)
    assert decide(selector, [again]) == reasons


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_zero_shot_classes(tmp_path, kind):
    image, text, uids = embeddings(count=60, topics=3)
    names = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 3)))[0].T  # the topics
    names = np.concatenate([names, -names[:1]]) * 7.0  # not normalised; a class without images
    path = str(tmp_path / f"names.{kind}")
    if kind == "npy":
        np.save(path, names)
    else:
        pq.write_table(pa.table({"name": ["x"] * 4, "text_embed": names.tolist()}), path)
    nearest = np.argmax(image @ names.T, axis=1)
    whole = table(image, text, uids)
    selector = Covariance(fraction=0.5, num_classes=None, labels=path)
    assert selector.inputs == {"labels": path}
    found = decide(selector, [whole])
    labels = names / 7.0
    members = [np.flatnonzero(nearest == k) for k in range(3)]
    kept = brute_force_pool(image, text, members, labels, 0.5)
    assert {uid for uid, reason in found.items() if reason is None} == {uids[i] for i in kept}


def brute_force_pool(image, text, members, labels, fraction):
    terms = pool_terms(image, text, members, labels)
    order = brute_force(**terms, fraction=fraction, variant="paper", period=200)
    return np.concatenate(members)[order].tolist()


def pool_terms(image, text, members, labels):
    """raw, label and centre terms pair by pair."""
    terms = {"similarity": [], "raw": [], "label_similarity": [], "centre_terms": []}
    for rows, label in zip(members, labels, strict=False):
        others = [i for i in range(len(image)) if i not in rows]
        plus = lambda a, b: max(float(image[a] @ text[b]), 0.0)  # noqa: E731
        terms["similarity"].append(image[rows] @ text[rows].T)
        terms["raw"].append([sum(plus(i, j) + plus(j, i) for j in rows) / len(rows) for i in rows])
        terms["label_similarity"].append([text[i] @ label for i in rows])
        terms["centre_terms"].append(
            [image[i] @ text[others].mean(0) + text[i] @ image[others].mean(0) for i in rows]
        )
    return terms


@pytest.mark.parametrize(
    "knobs",
    [
        {"fraction": -0.1},
        {"fraction": 0.5, "variant": "fixed"},
        {"fraction": 0.5, "num_classes": 0},
        {"fraction": 0.5, "iterations": 0},
        {"fraction": 0.5, "num_classes": None},
        {"fraction": 0.5, "class_column": "x"},
        {"fraction": 0.5, "num_classes": None, "class_column": "x", "labels": "y"},
        {"fraction": 0.5, "threshold": -0.1},
        {"fraction": 0.5, "threshold": 1.0},
        {"fraction": 0.5, "memory_gib": 0.0},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=next(reversed(knobs))):
        Covariance(**knobs)
