"""CLIP's vision transformer (arXiv:2103.00020, sec. 2.4), where dropped patches cost nothing.

Letters: B images, N patches, K kept patches, C channels, P patch size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.transformer import Transformer


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, without bias, at the patches asked for only.

    `weight` has a convolution's layout (width, C, P, P) and torch's initialisation of one.
    Why not nn.Conv2d: at keep=0.25 the patches that are thrown away would be 7 % of a ViT-B/32's
    forward.
    """

    def __init__(self, *, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, channels, patch_size, patch_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        size = self.patch_size
        grid = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        if kept is None:
            patches = grid.flatten(1, 2)
        else:
            row = torch.arange(len(images), device=images.device).unsqueeze(1)
            columns = grid.shape[2]
            patches = grid[row, kept // columns, kept % columns]
        return F.linear(patches.flatten(2), self.weight.flatten(1))


class VisionTransformer(nn.Module):
    """(B, 3, image_size, image_size) -> image features (B, width): the class token after `ln_post`.

    Attributes: width, image_size, num_tokens = N (patches, without the class token).
    Raises ValueError if patch_size does not divide image_size or an image has another size.
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
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}: "
                "change one of them"
            )
        self.width = width
        self.image_size = image_size
        self.num_tokens = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size=patch_size, width=width)
        # std width^-1/2 for class token and positions: CLIP's choice for the image tower.
        self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.position = nn.Parameter(torch.randn(1 + self.num_tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio, activation=activation
        )
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, image_size, image_size).

        kept: (B, K) int64 patch indices in [0, N), row-major, without the class token, in any
        order; None keeps all. A kept patch has the position embedding of the place it came from.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}, the tower was built with "
                f"image_size={self.image_size}: give the image transform the same image_size"
            )
        position = self.position[1:]
        patches = self.patch_embed(images, kept)
        patches = patches + (position if kept is None else F.embedding(kept, position))
        class_token = (self.class_token + self.position[0]).to(patches.dtype)
        x = torch.cat([class_token.expand(len(images), 1, -1), patches], dim=1)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0])
