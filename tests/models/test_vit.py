import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.vit import VisionTransformer


def tower(dtype: torch.dtype = torch.float64, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 3, "heads": 4}
    return VisionTransformer(**(options | changes)).to(dtype)


def embedded(model: VisionTransformer, images: Tensor) -> Tensor:
    """Class token and patches as a convolution gives them, with positions: (B, 1 + N, width)."""
    patches = F.conv2d(images, model.patch_embed.weight, stride=model.patch_embed.patch_size)
    patches = patches.flatten(2).transpose(1, 2)
    class_token = model.class_token.expand(len(images), 1, -1)
    return torch.cat([class_token, patches], dim=1) + model.position


def masked_forward(model: VisionTransformer, images: Tensor, kept: Tensor) -> Tensor:
    """All tokens go through the blocks; those not kept are hidden from every query."""
    x = model.ln_pre(embedded(model, images))
    visible = torch.zeros(x.shape[:2], dtype=torch.bool)
    visible[:, 0] = True
    visible.scatter_(1, kept + 1, True)
    for block in model.transformer.blocks:
        layer = block.attention
        query, key, value = (
            part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for part in layer.qkv(block.norm_1(x)).chunk(3, dim=-1)
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
        x = x + layer.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm_2(x))
    return model.ln_post(x[:, 0])


def random_batch(batch: int = 3, kept: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.rand(batch, 16, generator=generator).argsort(1)[:, :kept]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_dropped_patches_are_as_if_masked_out(activation: str) -> None:
    model = tower(activation=activation)
    images, kept = random_batch()
    expected = masked_forward(model, images, kept)
    torch.testing.assert_close(model(images, kept), expected, rtol=0, atol=1e-11)


def test_gradients_are_as_if_masked_out() -> None:
    model = tower()
    images, kept = random_batch()
    weights = torch.randn(3, 24, dtype=torch.float64)
    losses = [
        (f * weights).sum() for f in (model(images, kept), masked_forward(model, images, kept))
    ]
    ours, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for (name, _), mine, theirs in zip(model.named_parameters(), ours, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-10, name


def test_keeping_none_is_keeping_all_in_any_order() -> None:
    model = tower()
    images, everything = random_batch(kept=16)
    torch.testing.assert_close(model(images), model(images, everything), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model(images), masked_forward(model, images, everything), rtol=0, atol=1e-11
    )


def test_dropped_patches_are_not_read() -> None:
    model = tower()
    images, kept = random_batch()
    dropped = torch.ones(3, 16, dtype=torch.bool).scatter_(1, kept, False)
    pixels = dropped.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    ruined = images.masked_fill(pixels, math.nan)
    assert torch.equal(model(ruined, kept), model(images, kept))


def test_cost_is_that_of_the_kept_tokens() -> None:
    """7 of 64 patches kept cost what an image of 7 patches costs."""
    images = torch.randn(2, 3, 32, 32)
    small = torch.randn(2, 3, 4, 28)
    model = tower(torch.float32, image_size=32)
    kept = torch.arange(7).expand(2, 7)
    with FlopCounterMode(display=False) as dropped, torch.no_grad():
        model(images, kept)
    patches = model.patch_embed(small)
    assert patches.shape == (2, 7, 24)
    tokens = torch.randn(2, 8, 24)
    with FlopCounterMode(display=False) as needed, torch.no_grad():
        model.patch_embed(small)
        model.transformer(tokens)
    assert dropped.get_total_flops() == needed.get_total_flops() > 0


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        tower(image_size=18)
    with pytest.raises(ValueError, match=r"\(16, 20\).*image_size=16"):
        tower()(torch.zeros(1, 3, 16, 20, dtype=torch.float64))


def test_attributes() -> None:
    model = tower()
    assert (model.width, model.image_size, model.num_tokens) == (24, 16, 16)
