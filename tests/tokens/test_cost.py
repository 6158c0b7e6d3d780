"""What is dropped costs nothing in training, and nothing is dropped in evaluation."""

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.check import composed
from pipeline.config import build, check
from pipeline.data.images import ImageTransform
from pipeline.evals.trained import TrainedClip
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.phases import phases
from pipeline.tokens.attentive import AttentiveTokens
from pipeline.trainer.module import ContrastiveModule

IMAGE = ["random", "grid", "block"]
TEXT = ["truncate", "random", "shuffle", "block", "syntax"]
EMOJI = ["recipe=emoji", "debug=tiny", "name=x", "data.shards=y", "tokenizer.path=clip"]


def flops(forward: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def tower(image_size: int) -> VisionTransformer:
    return VisionTransformer(image_size=image_size, patch_size=4, width=24, layers=2, heads=2)


def text_tower(context_length: int) -> TextTransformer:
    return TextTransformer(
        vocab_size=49408, context_length=context_length, width=16, layers=2, heads=2
    )


def captions() -> torch.Tensor:
    tokens = torch.randint(1, 49406, (3, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return tokens


@pytest.mark.parametrize("policy", [*IMAGE, "attentive"])
def test_a_quarter_of_the_patches_costs_an_image_of_half_the_side(policy: str) -> None:
    """FLOPs of a tower of 8 x 8 patches that keeps 16 = those of a tower of 4 x 4."""
    noise = torch.rand(3, 64)
    if policy == "attentive":
        kept = AttentiveTokens(keep=0.2).from_attention(noise)  # int(0.2 * 16) + 1 cells of four
    else:
        cfg = composed("train", [*EMOJI, f"image_tokens={policy}", "image_tokens.keep=0.25"])
        kept = build(cfg.image_tokens).from_noise(noise)
    assert kept.shape == (3, 16)
    images = torch.rand(3, 3, 32, 32)
    dropped = flops(lambda: tower(32)(images, kept))
    small = flops(lambda: tower(16)(images[:, :, :16, :16]))
    assert dropped == small > 0
    assert dropped < flops(lambda: tower(32)(images)) / 3.5


@pytest.mark.parametrize("policy", TEXT)
def test_a_short_caption_costs_its_positions(policy: str) -> None:
    cfg = composed("train", [*EMOJI, f"text_tokens={policy}", "tokenizer.context_length=77"])
    check(cfg)
    reduced = build(cfg.text_tokens).reduce(captions(), torch.rand(3, 77))
    assert reduced.shape == (3, 16)
    cost = flops(lambda: text_tower(77)(reduced))
    assert cost == flops(lambda: text_tower(16)(captions()[:, :16])) > 0
    assert cost < flops(lambda: text_tower(77)(captions())) / 4


@pytest.mark.parametrize("policy", IMAGE)
def test_kept_patches_have_the_positions_they_came_from(policy: str) -> None:
    """Features do not know the order in which patches are given, only their places."""
    cfg = composed("train", [*EMOJI, f"image_tokens={policy}", "image_tokens.keep=0.5"])
    kept = build(cfg.image_tokens).from_noise(torch.rand(3, 64))
    torch.manual_seed(0)
    model, images = tower(32).double(), torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images, kept), model(images, kept.flip(1)), atol=1e-12, rtol=0)
    # the same patches one column further right are another image
    elsewhere = model(images.roll(4, dims=3), kept // 8 * 8 + (kept + 1) % 8)
    assert (model(images, kept) - elsewhere).abs().max() > 1e-3


class Counted(nn.Module):
    """A tower that remembers how many tokens it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.width, self.seen = inner, inner.width, []

    def forward(self, inputs: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append((tuple(inputs.shape), kept))
        return self.inner(inputs, kept)


def test_evaluation_sees_everything() -> None:
    """The policies belong to the training module; a trained model embeds without them."""
    overrides = ["image_tokens=grid", "text_tokens=block", "text_tokens.context_length=8"]
    cfg = composed("train", [*EMOJI, *overrides])
    model = CLIP(
        image=Counted(tower(32)),
        text=Counted(text_tower(cfg.tokenizer.context_length)),
        embed_dim=8,
    )
    module = ContrastiveModule(
        model=model,
        objective=nn.Module(),
        transform=ImageTransform(image_size=32),
        image_tokens=build(cfg.image_tokens),
        text_tokens=build(cfg.text_tokens),
        optimizer=None,
        schedule=None,
        phase=phases(cfg)[0],
        micro_batch_size=None,
        gradient_clip_norm=None,
        log_every_steps=1,
        seed=0,
    )
    trained = TrainedClip(
        model=module.model, tokenizer=build(cfg.tokenizer), transform=module.transform
    )
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "PNG")
    trained.image_embed([picture.getvalue()])
    trained.text_embed(["one two three four five six seven eight nine ten"])
    assert model.image.seen == [((1, 3, 32, 32), None)]
    assert model.text.seen == [((1, cfg.tokenizer.context_length), None)]
