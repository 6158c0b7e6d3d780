"""Search over images and texts together, and what the modality gap costs it (GR-CLIP,
arXiv:2507.19054).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def without_gap(embed: Tensor, mean: Tensor) -> Tensor:
    """(N, D) float64 of unit norm: rows minus their modality's mean over a calibration set."""
    return normalize(embed.double() - mean.double(), dim=1)


def ndcg(scores: Tensor, gain: Tensor, *, at: int = 10) -> Tensor:
    """(Q,) in [0, 1]: sum of gain / log2(place + 1) over the first `at`, as a share of the best.

    scores, gain: (Q, C), larger is better; of equal scores the smaller gain stands first, so a
    collapsed model gets the worst order. A query without any gain gets 0.
    """
    at = min(at, scores.shape[1])
    weight = 1 / torch.arange(2, at + 2, dtype=torch.float64).log2()
    worst = gain.argsort(dim=1, stable=True)
    order = scores.gather(1, worst).argsort(dim=1, descending=True, stable=True)
    found = gain.gather(1, worst).gather(1, order)[:, :at].double() @ weight
    best = gain.sort(dim=1, descending=True).values[:, :at].double() @ weight
    return torch.where(best > 0, found / best.clamp(min=1e-300), 0.0)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """(Q,) in [0, 1]: mean over relevant candidates of the precision at their place; ties count
    against. scores: (Q, C). relevant: (Q, C) bool, at least one True a row.
    """
    worst = relevant.int().argsort(dim=1, stable=True)
    order = scores.gather(1, worst).argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, worst).gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
    return (precision * hits).sum(1) / hits.sum(1)
