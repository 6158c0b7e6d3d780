"""Scores and what is relevant -> where the first right candidate stands: what recalls count.

A tie counts against the model: a candidate that scores as well as the right one stands before it,
so a collapsed model, whose scores are all equal, gets 0 and not 1.
Letters: Q queries, C candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.evals.bootstrap import Estimate, mean

# Similarities of float32 embeddings carry noise of about 1e-7, of distances above 1 relative, which
# depends on the batch an image was in; scores this close are the same score.
TIE = 1e-6


def ranks(scores: Tensor, relevant: Tensor, *, tie: float = TIE) -> Tensor:
    """Number of wrong candidates that stand before the best right one, per query: (Q,) int64.

    scores: (Q, C), larger is better.  relevant: (Q, C) bool, at least one True in each row. Other
    right candidates do not stand in the way. 0 is a hit at 1.
    Raises ValueError if the shapes differ, a query has nothing to find, or a score is not finite.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores are {tuple(scores.shape)}, relevant {tuple(relevant.shape)}")
    if not relevant.any(dim=1).all():
        row = int((~relevant.any(dim=1)).nonzero()[0])
        raise ValueError(f"query {row} has no right candidate")
    if not torch.isfinite(scores).all():
        raise ValueError("a score is not finite: the model diverged; evaluate an older checkpoint")
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best - tie * best.abs().clamp(min=1)) & ~relevant).sum(dim=1)


def recall(ranks: Tensor, *, at: Sequence[int]) -> dict[int, Estimate]:
    """Fraction of queries in [0, 1] with a right candidate among the first k, for each k."""
    return {k: mean(ranks < k) for k in at}
