"""Which pair is read at a position: functions of (seed, position) alone.

The order of an epoch: shards are permuted, `window_shards` consecutive ones are a window, pairs are
permuted inside their window. So any position is found without reading what lies before it.
Quality: a pair moves anywhere within its window, windows are contiguous in the permuted shards;
with window_shards >= the number of shards it is a full permutation. Packed shards are in uid (hash)
order already.
"""

import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

BLOCK = 256  # pairs over which a mixture's proportions are made exact


def generator(*key: Any) -> np.random.Generator:
    """A generator that is a function of `key` alone (counter-based; nothing global is touched)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class ShuffledOrder:
    """The global index at any place of any epoch. `starts`: first global index of each shard, and
    the total.

    keep: the pairs that take part in an epoch, as a mask over global indices; None: all, always.
    """

    def __init__(
        self,
        starts: np.ndarray,
        *,
        seed: Any,
        window_shards: int,
        keep: Callable[[int], np.ndarray] | None = None,
    ):
        if window_shards < 1:
            raise ValueError(f"window_shards {window_shards}: must be at least 1")
        self.starts, self.seed, self.window_shards = starts, seed, window_shards
        self.keep = lru_cache(2)(keep) if keep else None
        self.epoch = lru_cache(2)(self._epoch)
        self.window = lru_cache(3)(self._window)
        self._lengths: dict[int, int] = {}
        self.known = (0, 0)  # an epoch, and the position of its first pair

    def length(self, epoch: int) -> int:
        """Pairs of an epoch."""
        if self.keep is None:
            return int(self.starts[-1])
        if epoch not in self._lengths:
            self._lengths[epoch] = int(np.count_nonzero(self.keep(epoch)))
        return self._lengths[epoch]

    def _first(self, position: int) -> tuple[int, int]:
        """An epoch that starts at or before a position, and where: later than 0 if known."""
        return self.known if position >= self.known[1] else (0, 0)

    def place(self, position: int) -> tuple[int, int]:
        """(epoch, index in it) of the position-th pair since the start of training."""
        if self.keep is None:
            return divmod(position, self.length(0))
        epoch, start = self._first(position)
        while position - start >= self.length(epoch):
            start += self.length(epoch)
            epoch += 1
        return epoch, position - start

    def position(self, epoch: int, index: int) -> int:
        """The inverse of `place`. With `keep`, the epochs before must be counted."""
        if self.keep is None:
            return epoch * self.length(0) + index
        first, start = self.known if epoch >= self.known[0] else (0, 0)
        return start + sum(self.length(before) for before in range(first, epoch)) + index

    def remember(self, position: int, epoch: int, index: int) -> None:
        """That a position is this place, as a checkpoint tells: epochs before need no counting."""
        self.known = (epoch, position - index)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = generator(self.seed, "shards", epoch).permutation(len(self.starts) - 1)
        sizes = np.diff(self.starts)
        if self.keep is not None:
            kept = np.concatenate([[0], np.cumsum(self.keep(epoch))])
            sizes = np.diff(kept[self.starts])
        counts = sizes[shards]
        window_counts = np.add.reduceat(counts, np.arange(0, len(counts), self.window_shards))
        return shards, np.concatenate([[0], np.cumsum(window_counts)])

    def _window(self, epoch: int, window: int) -> np.ndarray:
        shards = self.window_of_shards(epoch, window)
        members = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        if self.keep is not None:
            members = members[self.keep(epoch)[members]]
        return generator(self.seed, "window", epoch, window).permutation(members)

    def window_at(self, epoch: int, index: int) -> int:
        """The window that a place of an epoch is in."""
        return int(np.searchsorted(self.epoch(epoch)[1], index, side="right")) - 1

    def window_of_shards(self, epoch: int, window: int) -> np.ndarray:
        """The shards of a window; the one behind the last is the first of the next epoch."""
        first = window * self.window_shards
        if first >= len(self.starts) - 1:
            epoch, first = epoch + 1, 0
        return self.epoch(epoch)[0][first : first + self.window_shards]

    def __call__(self, epoch: int, index: int) -> int:
        window = self.window_at(epoch, index)
        return int(self.window(epoch, window)[index - self.epoch(epoch)[1][window]])


class Interleaving:
    """Which of several datasets a position is read from, and the how-many-eth of its pairs it is.

    weights: shares of the pairs, any positive numbers. After every BLOCK pairs each dataset has
    given its share, rounded down or up, whatever the length of training; within a block the
    datasets are permuted. One number, the position, is the whole state.
    """

    def __init__(self, weights: Sequence[float], *, seed: Any):
        if not weights or any(not weight > 0 for weight in weights):
            raise ValueError(f"weights {list(weights)}: each must be above 0")
        exact = [Fraction(weight) for weight in weights]
        total, self.seed = sum(exact), seed
        # cumulated, so that the rounded shares of a block add up to the block
        self.bounds = [sum(exact[: k + 1]) / total for k in range(len(exact))]
        self.block = lru_cache(4)(self._block)

    def before(self, block: int) -> list[int]:
        """Pairs that each dataset gives before a block."""
        ends = [bound * block * BLOCK // 1 for bound in self.bounds]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before = np.array(self.before(block))
        counts = np.array(self.before(block + 1)) - before
        sources = np.repeat(np.arange(len(counts)), counts)
        sources = generator(self.seed, "mixture", block).permutation(sources)
        numbers = np.empty(BLOCK, np.int64)
        for source, (start, count) in enumerate(zip(before, counts, strict=True)):
            numbers[sources == source] = start + np.arange(count)
        return sources, numbers

    def __call__(self, position: int) -> tuple[int, int]:
        if len(self.bounds) == 1:
            return 0, position
        sources, numbers = self.block(position // BLOCK)
        return int(sources[position % BLOCK]), int(numbers[position % BLOCK])
