"""A CLIP of a few thousand parameters, and gradients for it."""

import torch

from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer


def tiny(layers: int = 1) -> CLIP:
    return CLIP(
        image=VisionTransformer(image_size=8, patch_size=4, width=16, layers=layers, heads=2),
        text=TextTransformer(vocab_size=20, context_length=6, width=16, layers=layers, heads=2),
        embed_dim=12,
    )


def gradients(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Small random gradients, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: (0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for name, p in model.named_parameters()
    }


def give_gradients(model: torch.nn.Module, step: int) -> None:
    found = gradients(model, step)
    for name, parameter in model.named_parameters():
        parameter.grad = found[name]
