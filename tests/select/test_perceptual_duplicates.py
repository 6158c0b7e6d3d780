import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.select import perceptual_duplicates as module
from curation.select.perceptual_duplicates import PerceptualDuplicates, close_pairs, leaders


def near_copies(count, seed=0, flips=5):
    """Distinct: random hashes, and copies of them with up to `flips` bits turned, shuffled."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count // 2, dtype=np.uint64)
    copies = hashes.copy()
    for i in range(len(copies)):
        for bit in rng.choice(64, rng.integers(0, flips + 1), replace=False):
            copies[i] ^= np.uint64(1) << np.uint64(bit)
    both = np.unique(np.concatenate([hashes, copies]))
    return rng.permutation(both)


def brute_force(hashes, max_distance):
    return [
        [i, j]
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= max_distance
    ]


@pytest.mark.parametrize("max_distance", [0, 1, 2, 4, 5, 8, 13, 16])
@pytest.mark.parametrize("dense", [False, True])
def test_close_pairs_equal_brute_force(max_distance, dense, monkeypatch):
    monkeypatch.setattr(module, "_CANDIDATES", 50)  # several runs
    hashes = near_copies(160)
    if dense:  # only 12 bits differ at all: most bands are equal everywhere
        hashes = np.unique(hashes & np.uint64(0x111))
        hashes = np.unique(np.concatenate([hashes, np.arange(40, dtype=np.uint64)]))
    found = close_pairs(hashes, max_distance=max_distance)
    assert found.dtype == np.int64
    assert found.tolist() == brute_force(hashes, max_distance)


@pytest.mark.parametrize("count", [2, 1000, 10**6])
@pytest.mark.parametrize("max_distance", [0, 3, 4, 8, 16])
def test_bands_cover_the_hash_and_cannot_miss(count, max_distance):
    widths, radius = module._bands(count, max_distance)
    assert sum(widths) == 64
    # k bits in m bands: were all bands more than `radius` apart, more than k bits would differ
    assert len(widths) * (radius + 1) > max_distance


def test_few_pairs_are_compared(monkeypatch):
    """Pigeonhole: the pairs that are looked at are a small part of all."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    compared = []
    count = np.bitwise_count

    def counting(values):
        compared.append(len(values))
        return count(values)

    monkeypatch.setattr(np, "bitwise_count", counting)
    close_pairs(hashes, max_distance=4)
    assert 0 < sum(compared) < 20_000 * 20_000 / 2 / 50


def test_leaders_in_order():
    """0 takes 1 and 2 away; 3 is close to 2 only, which is gone, so 3 stays."""
    pairs = np.array([[0, 1], [0, 2], [2, 3], [3, 5]])
    assert leaders(6, pairs).tolist() == [True, False, False, True, True, False]
    assert leaders(2, np.empty((0, 2), np.int64)).tolist() == [True, True]


def table(rows):
    uids, hashes = zip(*rows, strict=True)
    return pa.table({"uid": pa.array(uids), "phash": pa.array(hashes, pa.uint64())})


def decide(selector, parts):
    combined = selector.combine([selector.measure(p) for p in parts])
    found = {}
    for p in parts:
        answer = selector.apply(p, combined, 0).to_pylist()
        found.update(zip(p["uid"].to_pylist(), answer, strict=True))
    return found


def by_definition(rows, max_distance):
    kept = []
    for uid, value in sorted(row for row in rows if row[1] is not None):
        if all(bin(value ^ other).count("1") > max_distance for _, other in kept):
            kept.append((uid, value))
    stays = {uid for uid, _ in kept} | {uid for uid, value in rows if value is None}
    return {uid: None if uid in stays else "perceptual_duplicate" for uid, _ in rows}


@pytest.mark.parametrize("max_distance", [0, 3, 6])
def test_what_stays(max_distance):
    """By definition, whatever the order and the parts; nulls stay, also beside each other."""
    rng = np.random.default_rng(1)
    hashes = near_copies(60, flips=3)
    values = [int(value) for value in np.concatenate([hashes, hashes[:20]])] + [
        None,
        None,
        0,
        2**64 - 1,
    ]
    uids = [f"{value:08x}" for value in rng.permutation(len(values))]
    rows = list(zip(uids, values, strict=True))
    selector = PerceptualDuplicates(max_distance=max_distance)
    expected = by_definition(rows, max_distance)
    assert "perceptual_duplicate" in expected.values()
    assert decide(selector, [table(rows)]) == expected
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    parts = [table(shuffled[:5]), table(shuffled).slice(0, 0), table(shuffled[5:])]
    assert decide(selector, parts) == expected


def test_nothing_to_compare():
    assert decide(PerceptualDuplicates(), [table([("a", None)])]) == {"a": None}
    assert decide(PerceptualDuplicates(), [table([("a", 7)])]) == {"a": None}


@pytest.mark.parametrize("distance", [-1, 17])
def test_bad_distance(distance):
    with pytest.raises(ValueError, match=f"max_distance {distance}"):
        PerceptualDuplicates(max_distance=distance)
