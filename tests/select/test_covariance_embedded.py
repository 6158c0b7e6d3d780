import tracemalloc

import numpy as np
import pytest

from curation.select import covariance_greedy, covariance_pairs
from curation.select.covariance import select
from curation.select.covariance_embedded import select_embedded
from curation.select.covariance_pairs import EmbeddedPairs, Rows, UnthresholdedPairs
from curation.select.unit_vectors import normalised


def pool(sizes=(40, 1, 75), dim=8, seed=0):
    rng = np.random.default_rng(seed)
    image = normalised(rng.normal(size=(sum(sizes), dim)))
    text = normalised(image + 0.8 * rng.normal(size=(sum(sizes), dim)))
    order = rng.permutation(sum(sizes))
    members = [np.sort(rows) for rows in np.split(order, np.cumsum(sizes)[:-1])]
    labels = normalised(rng.normal(size=(len(sizes), dim))).astype(np.float64)
    return {"image": image, "text": text, "members": members, "labels": labels}


def by_matrices(image, text, members, labels, fraction, variant, threshold):
    """The same through whole matrices and the contract's `select`, terms by their definition."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    terms = {"similarity": [], "raw": [], "label_similarity": [], "centre_terms": []}
    for rows, label in zip(members, labels, strict=True):
        others = np.setdiff1d(np.arange(len(image)), rows)
        outside = [side[others].sum(axis=0) / max(1, len(others)) for side in (text, image)]
        similarity = image[rows] @ text[rows].T
        diagonal = np.diagonal(similarity)
        counted = np.where(similarity > threshold, similarity, 0.0)
        terms["similarity"].append(counted)
        terms["raw"].append((counted.sum(axis=0) + counted.sum(axis=1)) / len(rows))
        terms["label_similarity"].append(text[rows] @ label)
        # `select` reads the diagonal off the counted matrix: what is lacking there goes here
        terms["centre_terms"].append(
            image[rows] @ outside[0]
            + text[rows] @ outside[1]
            - 2.0 * (diagonal - np.diagonal(counted))
        )
    order = select(**terms, fraction=fraction, variant=variant)
    return np.concatenate(members)[order].tolist()


@pytest.fixture
def small_steps(monkeypatch):
    """Several updates, several blocks, bounds that lag behind a few picks, batches of a few."""
    monkeypatch.setattr(covariance_greedy, "PERIOD", 7)
    monkeypatch.setattr(covariance_greedy, "_LAG", 5)
    monkeypatch.setattr(covariance_greedy, "_BATCH", 2)
    monkeypatch.setattr(covariance_pairs, "_MAX_EDGE", 16)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("room", [0, 2**30], ids=["streamed", "held"])
@pytest.mark.parametrize("variant", ["paper", "notebook"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 1.0])
def test_equals_whole_matrices(room, variant, threshold, fraction):
    data = pool()
    rule = {"fraction": fraction, "variant": variant, "threshold": threshold}
    found = select_embedded(**data, **rule, room=room)
    assert found.dtype == np.int64
    assert found.tolist() == by_matrices(**data, **rule)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("variant", ["paper", "notebook"])
def test_lazy_bounds_are_exact(variant):
    """Not only the order: the same scores, bit for bit, held or streamed, with pairs that tie."""
    data = pool(sizes=(90,))
    data["image"][30:60], data["text"][30:60] = data["image"][:30], data["text"][:30]
    found = {}
    for room in (0, 2**30):
        sides = [Rows(data[side], np.arange(90)) for side in ("image", "text")]
        pairs = EmbeddedPairs(*sides, threshold=0.0, room=room)
        if pairs.fits:
            pairs.hold()
        static = pairs.row_sums() / 90 + 2.0 * pairs.diagonal()
        label = np.linspace(0, 1, 30)[np.arange(90) % 30]
        greedy = covariance_greedy.LatentClass(
            pairs, raw=static, label=label, static=static, variant=variant
        )
        while len(greedy.picks) < 90:
            greedy.extend(11)
        found[room] = (greedy.picks, greedy.values)
    assert found[0] == found[2**30]
    place = {pick: at for at, pick in enumerate(found[0][0])}
    assert all(place[i] < place[i + 30] for i in range(30))  # of equal pairs the first one first


def test_streaming_looks_at_a_part_of_the_class(monkeypatch):
    """Lazy: most bounds are never brought up to date."""
    data = pool(sizes=(1500,))
    looked = []
    partial = EmbeddedPairs.partial

    def counted(self, rows, picks, seen):
        looked.append(len(rows))
        return partial(self, rows, picks, seen)

    monkeypatch.setattr(EmbeddedPairs, "partial", counted)
    rule = {"fraction": 0.1, "variant": "paper", "threshold": 0.0}
    found = select_embedded(**data, **rule, room=0)
    assert found.tolist() == by_matrices(**data, **rule)
    assert 0 < sum(looked) < 0.5 * 150 * 1500


@pytest.mark.parametrize("variant", ["paper", "notebook"])
def test_without_threshold(variant, monkeypatch):
    monkeypatch.setattr(covariance_greedy, "PERIOD", 7)
    data = pool()
    expected = by_sums(**data, fraction=0.6, variant=variant, period=7)
    for room in (0, 2**30):
        found = select_embedded(**data, fraction=0.6, variant=variant, threshold=None, room=room)
        assert found.tolist() == expected


def by_sums(image, text, members, labels, fraction, variant, period):
    """Whole matrices without a threshold, and every score from all picks anew."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    static, cross, raw, label_of, owner = {}, {}, {}, {}, {}
    for k, (rows, label) in enumerate(zip(members, labels, strict=True)):
        others = np.setdiff1d(np.arange(len(image)), rows)
        similarity = image[rows] @ text[rows].T
        both = similarity + similarity.T
        for i, row in enumerate(rows.tolist()):
            raw[row], label_of[row], owner[row] = both[i].mean(), text[row] @ label, k
            cross[row] = dict(zip(rows.tolist(), both[i], strict=True))
            centre = image[row] @ text[others].mean(0) + text[row] @ image[others].mean(0)
            static[row] = raw[row] + 2 * similarity[i, i] + label_of[row] / 2 - centre
    chosen, picks, updates = [], [[] for _ in members], [[] for _ in members]
    for _ in range(int(len(image) * fraction)):

        def score(row):
            size = len(members[owner[row]])
            value = static[row]
            for new, counted in updates[owner[row]]:
                value -= sum(cross[row][j] + label_of[j] / 2 for j in new) / size
                value -= sum(raw[j] for j in counted) / size
            return value

        best = max((row for row in range(len(image)) if row not in chosen), key=score)
        chosen.append(best)
        mine = picks[owner[best]]
        mine.append(best)
        done = sum(len(new) for new, _ in updates[owner[best]])
        if variant == "paper":
            updates[owner[best]].append(([best], [best]))
        elif (len(mine) + 1) % period == 0:
            updates[owner[best]].append((mine[done:], list(mine)))
    return chosen


def test_sums_without_a_matrix():
    """sum_j S_ij = <image_i, sum of texts>: no similarity of two pairs is needed."""
    data = pool(sizes=(50,))
    rows = np.arange(50)
    pairs = UnthresholdedPairs(Rows(data["image"], rows), Rows(data["text"], rows), room=0)
    similarity = data["image"].astype(np.float64) @ data["text"].T.astype(np.float64)
    assert np.abs(pairs.row_sums() - similarity.sum(0) - similarity.sum(1)).max() < 1e-5
    picks = [4, 9, 33]
    expected = similarity[:, picks].sum(1) + similarity[picks].sum(0)
    assert np.abs(pairs.total(picks) - expected).max() < 1e-6


def test_memory_bound_is_respected():
    """With room for one class of three, the peak stays below it; with less, the answer stays."""
    data = pool(sizes=(700, 700, 700), dim=4)
    rule = {"fraction": 0.2, "variant": "paper", "threshold": 0.0}
    found, peaks = {}, {}
    for room in (2_000_000, 60_000_000):
        tracemalloc.start()
        found[room] = select_embedded(**data, **rule, room=room).tolist()
        peaks[room] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    per_pair = 200 * 2100
    assert peaks[2_000_000] < 2_000_000 + per_pair
    assert peaks[60_000_000] < 60_000_000 + per_pair
    assert peaks[60_000_000] > 700 * 700 * 4
    assert found[2_000_000] == found[60_000_000]


@pytest.mark.usefixtures("small_steps")
def test_a_class_that_takes_far_more_than_its_share(monkeypatch):
    """Its similarities are made again when its picks are used up."""
    data = pool(sizes=(60, 60))
    data["text"][data["members"][0]] = data["image"][data["members"][0]]  # one class is all well
    data["text"][data["members"][1]] = -data["image"][data["members"][1]]
    held = []
    hold = EmbeddedPairs.hold
    monkeypatch.setattr(EmbeddedPairs, "hold", lambda self: held.append(self) or hold(self))
    rule = {"fraction": 0.4, "variant": "paper", "threshold": 0.0}
    found = select_embedded(**data, **rule, room=2**30)
    assert found.tolist() == by_matrices(**data, **rule)
    assert len(held) > 2
    assert all(pairs.held is None for pairs in held)
