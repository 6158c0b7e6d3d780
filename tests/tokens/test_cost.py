"""What is dropped costs nothing in training, and nothing is dropped in evaluation."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from pipeline.check import composed
from pipeline.config import build, check
from pipeline.evals.trained import TrainedClip
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.attentive import AttentiveTokens

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


def test_evaluation_sees_everything(tmp_path: Path) -> None:
    """A run with both policies embeds every patch and every word."""
    overrides = ["image_tokens=grid", "text_tokens=block", "text_tokens.context_length=8"]
    overrides.append("model.text.vocab_size=49408")  # OpenAI's
    cfg = composed("train", [*EMOJI, *overrides])
    model = build(cfg.model)
    (tmp_path / "checkpoints").mkdir()
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "checkpoints" / "step-1.ckpt")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    trained = TrainedClip.load(tmp_path, device="cpu")
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "PNG")
    caption = "one two three four five six seven eight nine ten"
    pixels = trained.transform.normalise(trained.transform.evaluate(picture.getvalue())[None])
    with torch.no_grad():
        # every patch and word named one by one; the model itself drops nothing
        patches = torch.arange(model.image.num_tokens)[None]
        image = model.eval().encode_image(pixels, patches)
        text = model.encode_text(trained.tokenizer([caption]))
    found = trained.image_embed([picture.getvalue()])
    torch.testing.assert_close(found, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(trained.text_embed([caption]), text, atol=1e-6, rtol=0)
    # the last word is beyond the eight positions of training
    other = trained.text_embed([caption.replace("ten", "dog")])
    assert (other - text).abs().max() > 1e-4
