"""Selector: a random subset, the baseline that every other choice of as many pairs has to beat."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curation.step import uniform


@dataclass
class Pairs:
    """Every pair there is, how many stay, and the last one that stays: (draw, uid) by seed."""

    uids: np.ndarray
    count: int
    last: dict[int, tuple[float, str]] = field(default_factory=dict)


class RandomSubset:
    """Keeps int(n * fraction) of n pairs: those with the smallest draws of (seed, "random_subset",
    uid).

    Equal draws go by ascending uid. The sets are nested: a larger fraction under the same seed
    holds all pairs of a smaller one. Another `seed` of the command is another subset.
    Reason: "random". Price: every uid in memory, one hash of each.
    """

    name = "random_subset"
    version = 1
    reads = ()

    def __init__(self, *, fraction: float):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction {fraction} is outside [0, 1]")
        self.fraction = fraction

    def measure(self, part: pa.Table) -> np.ndarray:
        """The part's uids."""
        return _uids(part)

    def combine(self, measures: list[Any]) -> Pairs:
        uids = np.concatenate([np.empty(0, str), *measures])
        return Pairs(uids, int(len(uids) * self.fraction))

    def apply(self, part: pa.Table, combined: Pairs, seed: int) -> pa.Array:
        """random, or null."""
        if seed not in combined.last:  # the draws of the whole pool, once and not for each part
            combined.last[seed] = self._last(combined, seed)
        limit, last_uid = combined.last[seed]
        uids = _uids(part)
        draws = uniform(seed, self.name, uids.tolist())
        kept = (draws < limit) | ((draws == limit) & (uids <= last_uid))
        return pa.array(np.where(kept, None, "random").astype(object), pa.string())

    def _last(self, pairs: Pairs, seed: int) -> tuple[float, str]:
        if pairs.count == 0:
            return -1.0, ""  # below every draw
        draws = uniform(seed, self.name, pairs.uids.tolist())
        last = np.lexsort((pairs.uids, draws))[pairs.count - 1]
        return float(draws[last]), str(pairs.uids[last])


def _uids(part: pa.Table) -> np.ndarray:
    return np.asarray(part["uid"].to_pylist(), dtype=str)
