"""CLIP's vision transformer (arXiv:2103.00020, sec. 2.4) and its relatives; dropped patches cost
nothing.

Letters: B images, N patches, K patches seen, P prefix tokens (the class token: 1 or 0), C channels,
S patch size, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.pooling import POOLINGS, WITHOUT_WEIGHTS, AttentionPool, ClassToken
from pipeline.models.position import Rotary, sincos_table
from pipeline.models.transformer import BlockStyle, Transformer

SINCOS = {"sincos": False, "sincos_moco": True}  # does the last frequency reach 1/10000?
POSITIONS = ("learned", *SINCOS, "none")


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, at the patches asked for only.

    `weight` has a convolution's layout (width, C, S, S) and torch's initialisation of one.
    Why not nn.Conv2d: at keep=0.25 the patches that are thrown away would be 7 % of a ViT-B/32's
    forward.
    """

    def __init__(
        self, *, patch_size: int, width: int, channels: int = 3, bias: bool = False
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.initialise()

    def initialise(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        size = self.patch_size
        grid = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        if kept is None:
            patches = grid.flatten(1, 2)
        else:
            row = torch.arange(len(images), device=images.device).unsqueeze(1)
            columns = grid.shape[2]
            patches = grid[row, kept // columns, kept % columns]
        return F.linear(patches.flatten(2), self.weight.flatten(1), self.bias)


class VisionTransformer(nn.Module):
    """(B, 3, image_size, image_size) -> image features (B, W).

    class_token: a learned token in front of the patches. pooling: "class_token", "mean" of the
    patches, "mean_all" with the class token, or "map", a learned query's attention (SigLIP).
    norm_before_pooling: `ln_post` norms all tokens and not the pooled vector; the same for the
    class token.
    positions, added to patches: "learned", "sincos" and "sincos_moco" (fixed, see
    position.sincos_table) or "none". rotary_grid: also turn queries and keys by the patch's place,
    counted on a grid of this side (see position.Rotary); None does not.
    ln_pre: a norm in front of the blocks. patch_bias: of the patch embedding. block: what the
    blocks are made of.
    Attributes: width, image_size, num_tokens = N (without the class token), num_prefix = P.
    Raises ValueError for sizes that do not divide, unknown words, or an image of another size.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        class_token: bool = True,
        pooling: str = "class_token",
        norm_before_pooling: bool = False,
        positions: str = "learned",
        rotary_grid: int | None = None,
        ln_pre: bool = True,
        patch_bias: bool = False,
        block: BlockStyle | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check(image_size, patch_size, class_token, pooling, positions)
        style = block or BlockStyle()
        side = image_size // patch_size
        self.width = width
        self.image_size = image_size
        self.num_tokens = side**2
        self.num_prefix = int(class_token)
        self.norm_before_pooling = norm_before_pooling
        self.patch_embed = PatchEmbed(patch_size=patch_size, width=width, bias=patch_bias)
        self._make_tables(class_token, positions)
        self._initialise_tables()
        self.rotary = None
        if rotary_grid is not None:
            head, prefix = width // heads, self.num_prefix
            self.rotary = Rotary(side=side, grid=rotary_grid, head_width=head, prefix=prefix)
        self.ln_pre = style.make_norm(width) if ln_pre else nn.Identity()
        self.transformer = Transformer(
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=mlp_ratio,
            activation=activation,
            block=style,
            activation_checkpointing=activation_checkpointing,
        )
        self.ln_post = style.make_norm(width)
        self.pool = (
            WITHOUT_WEIGHTS[pooling]()
            if pooling in WITHOUT_WEIGHTS
            else AttentionPool(
                width=width,
                heads=heads,
                hidden=int(width * mlp_ratio),
                activation=activation,
                norm=style.make_norm(width),
            )
        )

    def _make_tables(self, class_token: bool, positions: str) -> None:
        self.positions = positions
        table = torch.empty(self.num_prefix + self.num_tokens, self.width)
        self.class_token = nn.Parameter(torch.empty(self.width)) if class_token else None
        if positions == "learned":
            self.position = nn.Parameter(table)
        else:  # not a weight, so not in checkpoints: another image size makes its own
            self.register_buffer(
                "position", table if positions in SINCOS else None, persistent=False
            )

    @torch.no_grad()
    def _initialise_tables(self) -> None:
        # std width^-1/2 for class token and positions: CLIP's choice for the image tower.
        if self.class_token is not None:
            self.class_token.normal_().mul_(self.width**-0.5)
        if self.positions == "learned":
            self.position.normal_().mul_(self.width**-0.5)
        elif self.position is not None:
            table = sincos_table(
                math.isqrt(self.num_tokens),
                self.width,
                prefix=self.num_prefix,
                device=self.position.device,
                to_the_end=SINCOS[self.positions],
            )
            self.position.copy_(table)

    def initialise(self) -> None:
        self._initialise_tables()

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, image_size, image_size).

        kept: (B, K) int64 patch indices in [0, N), row-major, without the class token, in any
        order; None keeps all. A kept patch has the position of the place it came from.
        """
        if isinstance(self.pool, ClassToken):
            first = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            return self.ln_post(self.tokens(images, kept, at=first)[:, 0])
        x = self.tokens(images, kept)
        if self.norm_before_pooling:
            return self.pool(self.ln_post(x), self.num_prefix)
        return self.ln_post(self.pool(x, self.num_prefix))

    def tokens(
        self, images: Tensor, kept: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """(B, P + K, W): all tokens after the last block, before `ln_post`. at: see Transformer."""
        rotary = None if self.rotary is None else self.rotary(kept)
        return self.transformer(self.embed(images, kept), rotary, at=at)

    def embed(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, P + K, W): what the first block is given."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}, the tower was built with "
                f"image_size={self.image_size}: give the image transform the same image_size"
            )
        x = self.patch_embed(images, kept)
        if self.position is not None:
            position = self.position[self.num_prefix :]
            x = x + (position if kept is None else F.embedding(kept, position))
        if self.class_token is not None:
            first = self.class_token
            if self.position is not None:
                first = first + self.position[0]
            x = torch.cat([first.to(x.dtype).expand(len(images), 1, -1), x], dim=1)
        return self.ln_pre(x)


def _check(
    image_size: int, patch_size: int, class_token: bool, pooling: str, positions: str
) -> None:
    if image_size % patch_size:
        raise ValueError(
            f"image_size {image_size} is not a multiple of patch_size {patch_size}: "
            "change one of them"
        )
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}: one of {sorted(POOLINGS)}")
    if positions not in POSITIONS:
        raise ValueError(f"unknown positions {positions!r}: one of {sorted(POSITIONS)}")
    if pooling == "class_token" and not class_token:
        raise ValueError(
            "pooling=class_token needs class_token=true; without one, pool with mean or map"
        )
