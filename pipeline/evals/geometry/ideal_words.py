"""Whether embeddings of combined concepts are sums of one vector a concept (Trager et al.,
arXiv:2302.14383).

Letters: A attributes, B objects, D width.
"""

import torch
from torch import Tensor


def ideal_words(embed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u_0 (D,), attributes (A, D), objects (B, D)) with embed[a, b] ~ u_0 + u_a + u_b.

    embed: (A, B, D), every attribute with every object. The least-squares solution with both sums
    zero: u_0 the mean, the others means over the rest minus u_0.
    """
    x = embed.double()
    centre = x.mean((0, 1))
    return centre, x.mean(1) - centre, x.mean(0) - centre


def residual_share(embed: Tensor) -> float:
    """Share in [0, 1] of the variance that the sums leave; 0: the concepts add up."""
    centre, attributes, objects = ideal_words(embed)
    x = embed.double() - centre
    left = x - attributes[:, None] - objects[None, :]
    total = float(x.square().sum())
    return float(left.square().sum()) / total if total else 0.0


def projector_without(directions: Tensor) -> Tensor:
    """(D, D) float64: removes the span of the rows of `directions`; applied twice it is itself."""
    _, values, basis = torch.linalg.svd(directions.double(), full_matrices=False)
    kept = basis[values > values.max() * 1e-10] if len(values) else basis
    return torch.eye(directions.shape[1], dtype=torch.float64) - kept.T @ kept
