"""From a tower's tokens to one vector.

Letters: B images, P prefix tokens, K patches seen, W width.
"""

import torch
from torch import Tensor, nn

from pipeline.models.attention import CrossAttention
from pipeline.models.mlp import make_mlp


class ClassToken(nn.Module):
    """The first token (CLIP)."""

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        return x[:, 0]


class MeanOfPatches(nn.Module):
    """Global average pooling: the patches' mean, without the class token (CLIPA)."""

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        return x[:, prefix:].mean(dim=1)


class MeanOfAll(nn.Module):
    """The mean of all tokens, the class token among them (FLIP)."""

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        return x.mean(dim=1)


class AttentionPool(nn.Module):
    """One learned query looks at all tokens, and an MLP adds to what it saw (MAP,
    arXiv:1810.00825; SigLIP).
    """

    def __init__(
        self, *, width: int, heads: int, hidden: int, activation: str, norm: nn.Module
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, width))
        self.attention = CrossAttention(width=width, heads=heads)
        self.norm = norm
        self.mlp = make_mlp(width=width, hidden=hidden, activation=activation)
        self.initialise()

    def initialise(self) -> None:
        width = self.probe.shape[1]
        nn.init.normal_(self.probe, std=width**-0.5)
        attention = self.attention
        for linear in (attention.query, attention.key_value, attention.out, *self.mlp.readers):
            nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.mlp.down.weight, std=width**-0.5)
        nn.init.zeros_(self.mlp.down.bias)

    def forward(self, x: Tensor, prefix: int) -> Tensor:
        seen = self.attention(self.probe.expand(len(x), 1, -1), x).squeeze(1)
        return seen + self.mlp(self.norm(seen))


WITHOUT_WEIGHTS = {"class_token": ClassToken, "mean": MeanOfPatches, "mean_all": MeanOfAll}
POOLINGS = (*WITHOUT_WEIGHTS, "map")
