"""Where two clouds of unit vectors lie, and how each is spread.

Letters: N pairs, D embedding width. All sums are in float64.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize


def modality_gap(image_embed: Tensor, text_embed: Tensor) -> float:
    """Distance of the two means (Liang et al., arXiv:2203.02053, sec. 2), in [0, 2]."""
    return float((image_embed.double().mean(0) - text_embed.double().mean(0)).norm())


def alignment(image_embed: Tensor, text_embed: Tensor) -> float:
    """Mean distance of the two of a pair, in [0, 2] (arXiv:2405.18570, sec. 3)."""
    return float((image_embed.double() - text_embed.double()).norm(dim=1).mean())


def uniformity(embed: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of rows (arXiv:2005.10242), in [-8, 0].

    Two antipodal points: -8; all the same: 0. Time N^2 D.
    """
    embed = embed.double()
    squared = torch.pdist(embed).square()
    if not len(squared):
        raise ValueError(f"{len(embed)} rows: uniformity needs two")
    return float((-2 * squared).logsumexp(0) - math.log(len(squared)))


def cross_uniformity(image_embed: Tensor, text_embed: Tensor) -> float:
    """The same over images and the texts of other pairs (arXiv:2405.18570, sec. 4), in [-8, 0]."""
    squared = torch.cdist(
        image_embed.double(),
        text_embed.double(),
        compute_mode="donot_use_mm_for_euclid_dist",  # exact for near rows
    ).square()
    others = ~torch.eye(len(squared), dtype=torch.bool)
    values = -2 * squared[others]
    return float(values.logsumexp(0) - math.log(len(values)))


def effective_rank(embed: Tensor) -> float:
    """exp of the entropy of the centred rows' normalised singular values (Roy, Vetterli, 2007): in
    [1, min(N - 1, D)].
    """
    values = torch.linalg.svdvals(embed.double() - embed.double().mean(0))
    share = values[values > 0] / values.sum()
    return float((-(share * share.log()).sum()).exp())


def conformity(embed: Tensor) -> Tensor:
    """(N,) float64: each row's mean cosine to the other rows (arXiv:2411.14517). Time N^2 D."""
    unit = normalize(embed.double(), dim=1)
    return ((unit @ unit.T).sum(1) - 1) / (len(unit) - 1)


def conformity_of_mean(embed: Tensor) -> Tensor:
    """(N,) float64: the same from each row's cosine to the mean, in time N D.

    With m the mean of the n unit rows: (n |m| cos(v, m) - 1) / (n - 1), which is exact.
    """
    unit = normalize(embed.double(), dim=1)
    mean, count = unit.mean(0), len(unit)
    cosine = unit @ normalize(mean, dim=0)
    return (count * mean.norm() * cosine - 1) / (count - 1)


def linear_separability(image_embed: Tensor, text_embed: Tensor, *, seed: int = 0) -> float:
    """Accuracy in [0, 1] on held-out rows of the best plane between images and texts; 0.5: none.

    Fitted by least squares on half of the pairs, whose two rows are never in both halves.
    """
    order = torch.randperm(len(image_embed), generator=torch.Generator().manual_seed(seed))
    fitted, asked = order[::2], order[1::2]
    if not len(asked):
        raise ValueError(f"{len(order)} pair: separability needs two")

    def rows(pairs: Tensor) -> Tensor:
        both = torch.cat([image_embed[pairs], text_embed[pairs]]).double()
        return torch.cat([both, torch.ones(len(both), 1, dtype=torch.float64)], dim=1)

    side = torch.cat([torch.ones(len(fitted)), -torch.ones(len(fitted))]).double()
    # a ridge of a millionth: rows may be fewer than dimensions
    known = rows(fitted)
    gram = known.T @ known + 1e-6 * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    plane = torch.linalg.solve(gram, known.T @ side)
    above = rows(asked) @ plane > 0
    truth = torch.arange(len(above)) < len(asked)
    return float((above == truth).double().mean())
