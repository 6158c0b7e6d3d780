"""Norms by name, and the learned gain of a residual branch."""

import torch
from torch import Tensor, nn

NORMS: dict[str, type[nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,  # arXiv:1910.07467; EVA-CLIP-18B (arXiv:2402.04252, sec. 2)
}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """A norm over the last dimension. Raises ValueError for an unknown kind."""
    if kind not in NORMS:
        raise ValueError(f"unknown norm {kind!r}: one of {sorted(NORMS)}")
    return NORMS[kind](width, eps=eps)


class LayerScale(nn.Module):
    """x * gain, one gain a channel (CaiT, arXiv:2103.17239, sec. 2). start: the gains' first value,
    1e-5 for deep towers: every block begins as nearly the identity.
    """

    def __init__(self, *, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gain = nn.Parameter(torch.empty(width))
        self.initialise()

    def initialise(self) -> None:
        nn.init.constant_(self.gain, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain
