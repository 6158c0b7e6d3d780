"""The transformer both towers share, and the choices inside its blocks.

Letters: B samples, N tokens, W width. The default block is CLIP's pre-norm block (arXiv:2103.00020,
sec. 2.4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.attention import Attention, check_heads, pick
from pipeline.models.mlp import make_mlp
from pipeline.models.norm import LayerScale, make_norm


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What a block is made of beside its sizes; a tower's own norms follow `norm` and `norm_eps`.

    norm: "layer" or "rms". norm_place: "before" attention and MLP, or "after" them, inside the
    residual (EVA-02-CLIP-E). qk_norm: queries and keys are normed, head by head. sub_norm: a norm
    in front of the attention's and of the MLP's output projection. layer_scale: the first value of
    learned gains on both branches; None for no gains. qkv_bias: "all", "query_value" (EVA) or
    "none".
    """

    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_place: str = "before"
    qk_norm: bool = False
    sub_norm: bool = False
    layer_scale: float | None = None
    qkv_bias: str = "all"

    def __post_init__(self) -> None:
        if self.norm_place not in BLOCKS:
            raise ValueError(f"unknown norm_place {self.norm_place!r}: one of {sorted(BLOCKS)}")

    def make_norm(self, width: int) -> nn.Module:
        return make_norm(self.norm, width, self.norm_eps)

    def norm_if(self, wanted: bool, width: int) -> nn.Module | None:
        return self.make_norm(width) if wanted else None

    def gain(self, width: int) -> nn.Module:
        if self.layer_scale is None:
            return nn.Identity()
        return LayerScale(width=width, start=self.layer_scale)


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
        style: BlockStyle,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        hidden = int(width * mlp_ratio)
        self.norm_1 = style.make_norm(width)
        self.attention = Attention(
            width=width,
            heads=heads,
            causal=causal,
            biases=style.qkv_bias,
            norm_query=style.norm_if(style.qk_norm, width // heads),
            norm_key=style.norm_if(style.qk_norm, width // heads),
            norm_mixed=style.norm_if(style.sub_norm, width),
        )
        self.gain_1 = style.gain(width)
        self.norm_2 = style.make_norm(width)
        self.mlp = make_mlp(
            width=width,
            hidden=hidden,
            activation=activation,
            norm=style.norm_if(style.sub_norm, hidden),
        )
        self.gain_2 = style.gain(width)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """at: (B,), the one token wanted of each row, (B, 1, W); see Attention."""
        mixed = self.attention(self.norm_1(x), rotary, seen, at)
        x = (x if at is None else pick(x, at)) + self.gain_1(mixed)
        return x + self.gain_2(self.mlp(self.norm_2(x)))


class PostNormBlock(Block):
    """x + norm(attention(x)), then x + norm(mlp(x)): the stream itself is never normed."""

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        mixed = self.norm_1(self.attention(x, rotary, seen, at))
        x = (x if at is None else pick(x, at)) + self.gain_1(mixed)
        return x + self.gain_2(self.norm_2(self.mlp(x)))


BLOCKS = {"before": Block, "after": PostNormBlock}


class Transformer(nn.Module):
    """A stack of blocks, (B, N, W) -> (B, N, W), with no norm around it.

    Initialised as CLIP does: layers that write into the residual stream are smaller by sqrt(2 *
    layers), so that the stream's variance does not grow with depth.
    activation_checkpointing: backward recomputes each block from its input. Price: one more forward
    of the blocks, for the memory of one block's activations instead of all.
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
        block: BlockStyle | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.activation_checkpointing = activation_checkpointing
        style = block or BlockStyle()
        self.blocks = nn.ModuleList(
            BLOCKS[style.norm_place](
                width=width,
                heads=heads,
                mlp_ratio=mlp_ratio,
                activation=activation,
                causal=causal,
                style=style,
            )
            for _ in range(layers)
        )
        self.initialise()

    def initialise(self) -> None:
        width = self.width
        residual_std = width**-0.5 * (2 * len(self.blocks)) ** -0.5
        for block in self.blocks:
            linears = {block.attention.qkv: width**-0.5, block.attention.out: residual_std}
            linears |= dict.fromkeys(block.mlp.readers, (2 * width) ** (-0.5))
            linears[block.mlp.down] = residual_std
            for linear, std in linears.items():
                nn.init.normal_(linear.weight, std=std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """rotary: cosines and sines of `position.Rotary`. seen: (B, N) bool, see Attention.

        at: (B,) int64, the one token wanted of each row; returns (B, 1, W). The last block then
        computes no other: nobody reads them, and 9 / 12 of a block's work is saved (6 % of a tower
        of 12).
        """
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            arguments = (x, rotary, seen, at if number == last else None)
            x = (
                checkpoint(block, *arguments, use_reentrant=False)
                if recompute
                else block(*arguments)
            )
        return x
