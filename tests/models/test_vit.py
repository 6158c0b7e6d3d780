import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.pooling import AttentionPool, ClassToken, MeanOfAll, MeanOfPatches
from pipeline.models.transformer import BlockStyle, PostNormBlock
from pipeline.models.vit import VisionTransformer


def tower(dtype: torch.dtype = torch.float64, **changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 3, "heads": 3}
    model = VisionTransformer(**(options | changes)).to(dtype)
    if model.rotary is not None:
        model.rotary.initialise()  # once more, in this type
    return model


def embedded(model: VisionTransformer, images: Tensor) -> Tensor:
    """Class token and patches as a convolution gives them, with positions: (B, P + N, width)."""
    layer = model.patch_embed
    x = F.conv2d(images, layer.weight, layer.bias, stride=layer.patch_size)
    x = x.flatten(2).transpose(1, 2)
    if model.class_token is not None:
        x = torch.cat([model.class_token.expand(len(images), 1, -1), x], dim=1)
    return x if model.position is None else x + model.position


def turned(model: VisionTransformer, x: Tensor) -> Tensor:
    """(B, H, P + N, d): pairs as complex numbers, turned by row and column of their patch."""
    side, bands = math.isqrt(model.num_tokens), x.shape[-1] // 4
    angles = torch.zeros(x.shape[-2], 2 * bands, dtype=torch.float64)
    for patch in range(model.num_tokens):
        for band in range(bands):
            for axis, place in enumerate(divmod(patch, side)):
                place = place * model.rotary.grid / side
                angle = place / 10000 ** (band / bands)
                angles[model.num_prefix + patch, axis * bands + band] = angle
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def attended(model: VisionTransformer, layer: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    query, key, value = (
        part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for part in layer.qkv(x).chunk(3, dim=-1)
    )
    query, key = layer.norm_query(query), layer.norm_key(key)
    if model.rotary is not None:
        query, key = turned(model, query), turned(model, key)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
    return layer.out(layer.norm_mixed((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))


def masked_forward(model: VisionTransformer, images: Tensor, kept: Tensor) -> Tensor:
    """All tokens go through the blocks; those not kept are hidden from every query and pooling."""
    x, first = model.ln_pre(embedded(model, images)), model.num_prefix
    visible = torch.zeros(x.shape[:2], dtype=torch.bool)
    visible[:, :first] = True
    visible.scatter_(1, kept + first, True)
    for block in model.transformer.blocks:
        branches = (
            (lambda y, block=block: attended(model, block.attention, y, visible), "1"),
            (block.mlp, "2"),
        )
        for branch, number in branches:
            norm, gain = getattr(block, f"norm_{number}"), getattr(block, f"gain_{number}")
            y = norm(branch(x)) if isinstance(block, PostNormBlock) else branch(norm(x))
            x = x + y * getattr(gain, "gain", 1.0)
    if model.norm_before_pooling:
        x = model.ln_post(x)
    rows = [row[seen] for row, seen in zip(x, visible, strict=True)]
    if isinstance(model.pool, AttentionPool):
        pooled = torch.stack([probed(model.pool, row) for row in rows])
    else:
        pick = {ClassToken: lambda r: r[0], MeanOfPatches: lambda r: r[first:].mean(0)}
        pick[MeanOfAll] = lambda r: r.mean(0)
        pooled = torch.stack([pick[type(model.pool)](row) for row in rows])
    return pooled if model.norm_before_pooling else model.ln_post(pooled)


def probed(pool: AttentionPool, row: Tensor) -> Tensor:
    """(K, width) -> (width,): the learned query's attention, head by head."""
    layer, size = pool.attention, row.shape[1] // pool.attention.heads
    query = layer.query(pool.probe)[0]
    key, value = layer.key_value(row).chunk(2, dim=-1)
    heads = []
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        weights = (key[:, part] @ query[part] / math.sqrt(size)).softmax(0)
        heads.append(weights @ value[:, part])
    seen = layer.out(torch.cat(heads))
    return seen + pool.mlp(pool.norm(seen))


def random_batch(batch: int = 3, kept: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.rand(batch, 16, generator=generator).argsort(1)[:, :kept]


OPTIONS = {
    "clip": {},
    "quick": {"activation": "quick_gelu"},
    "clipa": {"pooling": "mean", "positions": "sincos_moco", "ln_pre": False},
    "flip": {"pooling": "mean_all", "norm_before_pooling": True, "positions": "sincos"},
    "siglip": {
        "class_token": False,
        "pooling": "map",
        "norm_before_pooling": True,
        "patch_bias": True,
        "activation": "gelu_tanh",
    },
    "eva02": {
        "rotary_grid": 6,
        "activation": "swiglu",
        "block": BlockStyle(sub_norm=True, qkv_bias="query_value"),
    },
    "eva_18b": {
        "positions": "none",
        "block": BlockStyle(norm="rms", norm_place="after", qkv_bias="none"),
    },
    "rotary, no class": {
        "class_token": False,
        "pooling": "mean",
        "positions": "none",
        "rotary_grid": 4,
        "block": BlockStyle(qk_norm=True, layer_scale=0.5),
    },
}


def shaken(**options: object) -> VisionTransformer:
    """Every parameter off its initial value, so that one forgotten shows."""
    model = tower(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("options", OPTIONS)
def test_dropped_patches_are_as_if_masked_out(options: str) -> None:
    model = shaken(**OPTIONS[options])
    images, kept = random_batch()
    expected = masked_forward(model, images, kept)
    torch.testing.assert_close(model(images, kept), expected, rtol=0, atol=1e-10)
    assert (model(images, kept) - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize("options", OPTIONS)
def test_keeping_all_is_not_dropping(options: str) -> None:
    model = shaken(**OPTIONS[options])
    images, everything = random_batch(kept=16)
    torch.testing.assert_close(model(images), model(images, everything), rtol=0, atol=1e-12)
    expected = masked_forward(model, images, everything)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", ["clip", "eva02", "siglip"])
def test_recomputed_activations_change_nothing(options: str) -> None:
    model, again = (
        shaken(**OPTIONS[options], activation_checkpointing=recompute)
        for recompute in (False, True)
    )
    images, kept = random_batch()
    for tower_ in (model, again):
        tower_(images, kept).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_recomputed_activations_are_not_kept() -> None:
    def kept_bytes(recompute: bool) -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        model = tower(torch.float32, layers=6, activation_checkpointing=recompute)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(2, 3, 16, 16))
        return sum(sizes)

    assert kept_bytes(True) < kept_bytes(False) / 4


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
    first = torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as needed, torch.no_grad():
        model.patch_embed(small)
        model.transformer(tokens, at=first)
    assert dropped.get_total_flops() == needed.get_total_flops() > 0


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(ValueError, match=r"'gap': one of \['class_token', 'map', 'mean'"):
        tower(pooling="gap")
    with pytest.raises(ValueError, match=r"'rope': one of \['learned', 'none', 'sincos'"):
        tower(positions="rope")
    with pytest.raises(ValueError, match="pooling=class_token needs class_token=true"):
        tower(class_token=False)
    with pytest.raises(ValueError, match="head width that is a multiple of 4, not 6"):
        tower(rotary_grid=4, heads=4)
    with pytest.raises(ValueError, match="multiple of 4, from 8 on, not 6"):
        tower(positions="sincos", width=6, heads=1)
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        tower(image_size=18)
    with pytest.raises(ValueError, match=r"\(16, 20\).*image_size=16"):
        tower()(torch.zeros(1, 3, 16, 20, dtype=torch.float64))


def test_attributes() -> None:
    model = tower()
    assert (model.width, model.image_size, model.num_tokens) == (24, 16, 16)


def test_fixed_positions_are_no_weights_and_those_of_their_papers() -> None:
    """MAE's (arXiv:2111.06377) and MoCo v3's differ in where the frequencies end."""
    for positions, steps in (("sincos", 6), ("sincos_moco", 5)):
        model = tower(positions=positions)
        assert "position" not in model.state_dict()
        for patch in (0, 5, 14):
            row, column = divmod(patch, 4)
            expected = [
                function(place / 10000 ** (band / steps))
                for place in (column, row)
                for function in (math.sin, math.cos)
                for band in range(6)
            ]
            found = model.position[1 + patch].tolist()
            assert found == pytest.approx(expected, abs=1e-6)
        assert not model.position[0].any()
