"""How far a number would move with another sample of the same size (the bootstrap, Efron 1979).

An interval covers the choice of the items alone: not the choice of the set, nor another seed of the
training, which moves the numbers of a small model by more.
"""

import numpy as np
import torch
from torch import Tensor

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0
PIECE = 16_000_000  # drawn indices in memory at once: 128 MB


class Estimate(float):
    """A number between two others: `low` and `high` are its 95 % interval."""

    low: float
    high: float

    def __new__(cls, value: float, low: float, high: float) -> "Estimate":
        made = super().__new__(cls, value)
        made.low, made.high = low, high
        return made


def mean(values: Tensor) -> Estimate:
    """The mean of `values`, (n,), one an item, with `interval` around it."""
    return Estimate(float(values.double().mean()), *interval(values))


def mean_of_means(values: Tensor, groups: Tensor) -> Estimate:
    """The mean over groups of their mean, as in mean per-class recall.

    values: (n,).  groups: (n,) int64. Groups are drawn whole: within one of a single item nothing
    could be drawn, and the interval would say that nothing is unsure.
    """
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, group, values.double())
    return mean(sums / sizes)


def interval(
    values: Tensor, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """The percentile interval of the mean of `values`, (n,): items drawn with replacement.

    The same values and seed give the same interval. Raises ValueError for no values.
    """
    if values.dim() != 1 or not len(values) or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"values {tuple(values.shape)}, level {level}, resamples {resamples}: need (n,) with "
            "n > 0, a level in (0, 1), and at least one resample"
        )
    found, rng = values.double().cpu().numpy(), np.random.default_rng(seed)
    count = len(found)
    if np.isin(found, (0.0, 1.0)).all():  # the number of hits in a resample is binomial
        means = rng.binomial(count, found.mean(), size=resamples) / count
        return _bounds(means, level)
    piece = max(1, PIECE // count)
    means = [
        found[rng.integers(count, size=(min(piece, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, piece)
    ]
    return _bounds(np.concatenate(means), level)


def _bounds(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
