"""Where a position is read from: shuffled evenly, mixed exactly, found without counting."""

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from pipeline.data.order import BLOCK, Interleaving, ShuffledOrder

STARTS = np.arange(0, 40 * 100 + 1, 100)  # 40 shards of 100 pairs


def displacement(window):
    """Mean distance between where two neighbours of a shard are read, in shares of the epoch."""
    order = ShuffledOrder(STARTS, seed=1, window_shards=window)
    places = np.empty(4000, np.int64)
    for index in range(4000):
        places[order(0, index)] = index
    return np.abs(np.diff(places.reshape(40, 100), axis=1)).mean() / 4000


def test_neighbours_are_parted_by_a_third_of_a_window():
    """Two uniform places in a window of share w are w / 3 apart: 1/3 is a full shuffle."""
    for window, share in ((4, 0.1), (10, 0.25), (40, 1.0), (64, 1.0)):
        assert displacement(window) == pytest.approx(share / 3, rel=0.06)


def test_batches_mix_the_shards_of_their_window():
    """The shards in a batch follow the hypergeometric law: the variance of their counts tells."""
    order = ShuffledOrder(STARTS, seed=2, window_shards=10)
    counts = []
    for batch in range(40):
        shards = Counter(order(0, batch * 100 + n) // 100 for n in range(100))
        counts += list(shards.values()) + [0] * (10 - len(shards))
    expected = 100 * 0.1 * 0.9 * (900 / 999)
    assert np.var(counts) == pytest.approx(expected, rel=0.25)


def test_windows_follow_the_permuted_shards_and_wrap_into_the_next_epoch():
    order = ShuffledOrder(STARTS, seed=3, window_shards=16)
    windows = [order.window_of_shards(0, w) for w in range(3)]
    assert sorted(np.concatenate(windows)) == list(range(40)) and len(windows[2]) == 8
    assert np.array_equal(order.window_of_shards(0, 3), order.window_of_shards(1, 0))
    for index in range(0, 4000, 37):
        window = order.window_at(0, index)
        assert order(0, index) // 100 in windows[window]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1e-3, 1.0], [2.5]])
def test_a_mixture_keeps_its_shares_at_every_block(weights):
    mixed = Interleaving(weights, seed=0)
    seen, total = np.zeros(len(weights), int), sum(Fraction(w) for w in weights)
    for position in range(20 * BLOCK):
        source, number = mixed(position)
        assert number == seen[source]  # the next of its own, none left out
        seen[source] += 1
        if (position + 1) % BLOCK == 0:
            for count, weight in zip(seen, weights, strict=True):
                assert abs(count - Fraction(weight) / total * (position + 1)) < 1


def test_a_mixture_is_shuffled_within_its_blocks():
    orders = [Interleaving([1, 1], seed=seed) for seed in (0, 1)]
    sources, others = ([order(n)[0] for n in range(40 * BLOCK)] for order in orders)
    runs = 1 + np.count_nonzero(np.diff(sources))
    # runs of a random order of n and n: n + 1, variance n(n - 1) / (2n - 1)
    half = BLOCK / 2
    deviation = (40 * half * (half - 1) / (BLOCK - 1)) ** 0.5
    assert abs(runs - 40 * (half + 0.5)) < 4 * deviation
    assert sources != others


def test_a_far_position_of_a_mixture_costs_no_more():
    started = time.process_time()
    mixed = Interleaving([0.6, 0.4], seed=0)
    far = 10**13
    source, number = mixed(far)
    assert time.process_time() - started < 0.05
    assert abs(number - far * (0.6, 0.4)[source]) < BLOCK


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [float("nan")]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Interleaving(weights, seed=0)


def test_a_remembered_place_saves_counting_the_epochs_before():
    rng, asked = np.random.default_rng(0), []

    def keep(epoch):
        asked.append(epoch)
        return np.random.default_rng(epoch).random(4000) < 0.5

    counted = ShuffledOrder(STARTS, seed=0, window_shards=4, keep=keep)
    position = int(rng.integers(60_000, 70_000))
    epoch, index = counted.place(position)
    assert epoch > 25 and counted.position(epoch, index) == position
    asked.clear()
    told = ShuffledOrder(STARTS, seed=0, window_shards=4, keep=keep)
    told.remember(position, epoch, index)
    for step in range(0, 9000, 500):
        assert told.place(position + step) == counted.place(position + step)
    assert min(asked) >= epoch
    assert told.place(5) == counted.place(5)  # what lies before is counted from the start
