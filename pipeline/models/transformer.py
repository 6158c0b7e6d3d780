"""The pre-norm transformer both towers share (CLIP, arXiv:2103.00020, sec. 2.4).

Letters: B samples, N tokens, H heads. Parameters are laid out so that export to open_clip and
transformers is a renaming: `qkv` is the fused input projection, query, key and value stacked in
this order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x): the GELU approximation OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGelu}


class Attention(nn.Module):
    """Multi-head self-attention by torch's fused kernel; causal: token i sees tokens 0..i."""

    def __init__(self, *, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width {width} is not a multiple of heads {heads}: change one of them"
            )
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, *, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: one of {sorted(ACTIVATIONS)}")
        self.up = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width=width, heads=heads, causal=causal)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width=width, hidden=int(width * mlp_ratio), activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """A stack of blocks, (B, N, width) -> (B, N, width), with no norm around it.

    Initialised as CLIP does: layers that write into the residual stream are smaller by sqrt(2 *
    layers), so that the stream's variance does not grow with depth.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width=width, heads=heads, mlp_ratio=mlp_ratio, activation=activation, causal=causal
            )
            for _ in range(layers)
        )
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.blocks:
            linears = {
                block.attention.qkv: width**-0.5,
                block.attention.out: residual_std,
                block.mlp.up: (2 * width) ** -0.5,
                block.mlp.down: residual_std,
            }
            for linear, std in linears.items():
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
