"""Where a patch lies: fixed sine-cosine tables, and rotations of queries and keys.

Letters: B images, N patches = S x S of a square grid in row-major order, P prefix tokens (the class
token, or none), H heads, d width of a head.
"""

import torch
from torch import Tensor, nn


def _frequencies(count: int, *, to_the_end: bool = False, device: torch.device) -> Tensor:
    """`count` frequencies from 1 down to 1/10000, or to one step before it; float64."""
    steps = count - to_the_end
    return 10000.0 ** (-torch.arange(count, dtype=torch.float64, device=device) / steps)


def _grid(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (S * S,) float64."""
    place = torch.arange(side, dtype=torch.float64, device=device)
    return place.repeat_interleave(side), place.repeat(side)


def sincos_table(
    side: int, width: int, *, prefix: int, device: torch.device, to_the_end: bool = False
) -> Tensor:
    """(P + S * S, width) float32: fixed 2-D positions.

    Half of the channels tell the column and half the row, each sines, then cosines. Prefix rows
    are 0. to_the_end: the last frequency is 1/10000 (MoCo v3, arXiv:2104.02057, and with it
    CLIPA-v2), else one step before it (MAE, arXiv:2111.06377, and with it FLIP).
    Raises ValueError unless width is a multiple of 4, 8 at least.
    """
    if width % 4 or width < 8:
        raise ValueError(
            f"sine-cosine positions need a width that is a multiple of 4, from 8 on, not {width}"
        )
    frequencies = _frequencies(width // 4, to_the_end=to_the_end, device=device)
    row, column = _grid(side, device)
    angles = [place[:, None] * frequencies for place in (column, row)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(prefix, width), table]).float()


class Rotary(nn.Module):
    """2-D rotary positions (RoPE, arXiv:2104.09864; for patches EVA-02, arXiv:2303.11331).

    A head's channels are d / 2 pairs; the first half turns by the patch's row, the second by its
    column, both counted as if the grid had `grid` patches a side: a tower trained at one size sees
    another as finer or coarser steps over the same field. Prefix tokens are not turned.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, *, side: int, grid: int, head_width: int, prefix: int) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(
                f"rotary positions need a head width that is a multiple of 4, not {head_width}: "
                "change width or heads"
            )
        self.side, self.grid, self.head_width, self.prefix = side, grid, head_width, prefix
        for name in ("cos", "sin"):
            table = torch.empty(prefix + side * side, head_width // 2)
            self.register_buffer(name, table, persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        frequencies = _frequencies(self.head_width // 4, device=self.cos.device)
        places = _grid(self.side, self.cos.device)
        scale = self.grid / self.side
        angles = torch.cat([place[:, None] * scale * frequencies for place in places], dim=1)
        angles = torch.cat([angles.new_zeros(self.prefix, self.head_width // 2), angles])
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """kept: (B, K) patch indices or None. Cosines and sines that broadcast to
        (B, H, P + K, d / 2).
        """
        if kept is None:
            return self.cos, self.sin
        first = torch.arange(self.prefix, device=kept.device).expand(len(kept), -1)
        places = torch.cat([first, kept + self.prefix], dim=1)
        return self.cos[places].unsqueeze(1), self.sin[places].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of the last dimension by their angles, in float32."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
