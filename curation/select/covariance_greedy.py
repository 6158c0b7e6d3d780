"""The greedy of covariance selection (ClipCov, arXiv:2403.12267): each class alone, then merged.

A pick changes the scores of its own class only. So each class has one sequence of picks, whatever
the others do, and the best pair of the pool is always the head of some class's sequence: a heap of
the heads merges them. Classes can be worked off one after the other, in the memory of one.

Within a class the variant "paper" changes all scores with every pick. Where C is not in memory the
scores are bounds: what a pick takes off them is not negative, so they are too high, and only those
at the top need to learn of the latest picks (lazy greedy, Minoux 1978); every 256 picks all do.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from curation.select.covariance_pairs import EmbeddedPairs, Pairs

Variant = Literal["paper", "notebook"]
PERIOD = 200  # the notebook updates a class at pick 199, 399, ... of it
_LAG = 256  # picks that bounds may lag behind, before all are brought up to date in one product
_BATCH = 64  # bounds brought up to date together, four times as many at each next attempt


class LatentClass:
    """One class's picks in order, as far as they were asked for.

    raw, label, static: (n,) float64, see `curation.select.covariance`; static is the score before
    any pick. `picks` are places in the class, `values` their scores when they were picked.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        raw: np.ndarray,
        label: np.ndarray,
        static: np.ndarray,
        variant: Variant,
    ):
        self.pairs, self.raw, self.label, self.variant = pairs, raw, label, variant
        self.static = static.astype(np.float64)  # a copy: -inf where picked
        self.picks: list[int] = []
        self.values: list[float] = []
        self.offset = 0.0  # what the picks took off every score of the class
        self.cross = np.zeros(len(static))  # sum of C over the picks that a row has seen
        self.bound = self.static.copy()  # static - cross / n, offset not counted
        self.visible = 0  # picks that the scores know of, by the rules of the variant
        self.settled = 0  # picks that every row has seen
        self.seen = np.zeros(len(static), np.int32)  # picks after those that a row has seen

    def __len__(self) -> int:
        return len(self.static)

    def extend(self, count: int) -> None:
        """At least `count` more picks, fewer only if the class ends."""
        target = min(len(self.picks) + count, len(self))
        while len(self.picks) < target:
            if self.variant == "paper":
                self._see()
                self._take([self._best()])
            else:
                if (len(self.picks) + 1) % PERIOD == 0:
                    self._see()
                self._take(self._leading(PERIOD - (len(self.picks) + 1) % PERIOD))

    def _take(self, picks: list[int]) -> None:
        self.values.extend((self.bound[picks] - self.offset).tolist())
        self.picks.extend(picks)
        self.static[picks] = self.bound[picks] = -np.inf

    def _see(self) -> None:
        """The scores learn of the latest picks; the notebook deducts raw of earlier ones again."""
        new = self.picks[self.visible :]
        if not new:
            return
        counted = self.picks if self.variant == "notebook" else new
        self.offset += self.raw[counted].sum() / len(self)
        self.offset += self.label[new].sum() / 2.0 / len(self)
        self.visible = len(self.picks)
        lazy = (
            self.variant == "paper"
            and isinstance(self.pairs, EmbeddedPairs)
            and self.pairs.held is None
        )
        if not lazy or self.visible - self.settled >= _LAG:
            self.settle()

    def settle(self) -> None:
        """Bring all rows up to date; needed before similarities are held that were not."""
        pending = self.picks[self.settled : self.visible]
        if not pending:
            return
        if self.seen.any():
            for start in range(0, len(self), self.pairs.edge):
                self._refresh(np.arange(start, min(start + self.pairs.edge, len(self))), pending)
            self.seen[:] = 0
        else:
            self.cross += self.pairs.total(pending)
            if np.isnan(self.cross.sum()):
                raise ValueError("similarity holds NaN: drop pairs without embeddings first")
            np.divide(self.cross, -len(self), out=self.bound)
            self.bound += self.static
        self.settled = self.visible

    def _refresh(self, rows: np.ndarray, pending: list[int]) -> None:
        self.cross[rows] += self.pairs.partial(rows, pending, self.seen[rows])
        self.seen[rows] = len(pending)
        self.bound[rows] = self.static[rows] - self.cross[rows] / len(self)

    def _best(self) -> int:
        """The first place of the highest score."""
        pending = self.picks[self.settled : self.visible]
        size = _BATCH
        while True:
            best = int(np.argmax(self.bound))
            if self.seen[best] == len(pending):
                return best
            size = min(size, self.pairs.edge, len(self) - len(self.picks))
            top = np.flatnonzero(self.bound >= _largest(self.bound, size))[: self.pairs.edge]
            self._refresh(np.union1d(top[self.seen[top] < len(pending)], best), pending)
            size *= 4

    def _leading(self, count: int) -> list[int]:
        """The places of the `count` highest scores, best first, equal ones by place."""
        count = min(count, len(self) - len(self.picks))
        among = np.flatnonzero(self.bound >= _largest(self.bound, count))
        return among[np.argsort(-self.bound[among], kind="stable")[:count]].tolist()


def _largest(values: np.ndarray, rank: int) -> float:
    """The rank-th largest value."""
    return float(np.partition(values, len(values) - rank)[len(values) - rank])


def merged(
    classes: Sequence[LatentClass],
    identities: Sequence[np.ndarray],
    count: int,
    extend: Callable[[int], None],
) -> np.ndarray:
    """Ids of the `count` best pairs of all classes in the order of selection, int64.

    identities: of each class, the ids of its places; equal scores go by ascending id.
    extend(k): called when class k's picks are used up and it has more.
    """
    used = [0] * len(classes)
    heads: list[tuple[float, int, int]] = []

    def push(k: int) -> None:
        latent_class = classes[k]
        if used[k] == len(latent_class):
            return
        if used[k] == len(latent_class.picks):
            extend(k)
        place = used[k]
        identity = int(identities[k][latent_class.picks[place]])
        heapq.heappush(heads, (-latent_class.values[place], identity, k))

    if count:
        for k in range(len(classes)):
            push(k)
    chosen = np.empty(count, np.int64)
    for position in range(count):
        _, chosen[position], k = heapq.heappop(heads)
        used[k] += 1
        if position + 1 < count:
            push(k)
    return chosen
