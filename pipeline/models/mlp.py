"""The feed-forward half of a block: two layers and an activation, or a gate.

Letters: N tokens, W width, H hidden width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x): the GELU approximation OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),  # JAX's default, so SigLIP's
    "quick_gelu": QuickGelu,
}


class Mlp(nn.Module):
    """down(norm(activation(up(x)))). norm: of the hidden layer, an identity for none (sub-LN)."""

    def __init__(
        self, *, width: int, hidden: int, activation: str, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = sorted({*ACTIVATIONS, GATED})
            raise ValueError(f"unknown activation {activation!r}: one of {known}")
        self.up = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.norm = norm or nn.Identity()
        self.down = nn.Linear(hidden, width)

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        """The layers that read the stream."""
        return (self.up,)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.activation(self.up(x))))


class SwigluMlp(nn.Module):
    """down(norm(silu(gate(x)) * up(x))) (arXiv:2002.05202).

    Price: three matrices; `mlp_ratio` 8/3 has the parameters of a plain MLP's 4 (EVA-02,
    arXiv:2303.11331, sec. 2.1).
    """

    def __init__(self, *, width: int, hidden: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.norm = norm or nn.Identity()
        self.down = nn.Linear(hidden, width)

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        """The layers that read the stream."""
        return (self.gate, self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


GATED = "swiglu"


def make_mlp(
    *, width: int, hidden: int, activation: str, norm: nn.Module | None = None
) -> Mlp | SwigluMlp:
    """activation: a name of ACTIVATIONS, or "swiglu" for the gated one."""
    if activation == GATED:
        return SwigluMlp(width=width, hidden=hidden, norm=norm)
    return Mlp(width=width, hidden=hidden, activation=activation, norm=norm)
