"""What of a model other software must be told, and a refusal of what it cannot express."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.data.tokenizer import BpeTokenizer
from pipeline.evals.trained import TrainedClip
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.mlp import ACTIVATIONS
from pipeline.models.vit import VisionTransformer

LAYER_NORM_EPS = 1e-5  # torch's, open_clip's and the one written into transformers' config


@dataclass(frozen=True)
class Tower:
    """One transformer. `hidden` is the width inside its MLPs, `activation` our name of it."""

    width: int
    layers: int
    heads: int
    hidden: int
    activation: str

    @property
    def mlp_ratio(self) -> float:
        """The factor from which int(width * factor) gives `hidden` again."""
        ratio = self.hidden / self.width
        return ratio if int(self.width * ratio) == self.hidden else (self.hidden + 0.5) / self.width


@dataclass(frozen=True)
class Architecture:
    """A CLIP of two transformers, in numbers. `eot` is the token the text tower pools at."""

    image: Tower
    text: Tower
    image_size: int
    patch_size: int
    vocab_size: int
    context_length: int
    embed_dim: int
    eot: int


def describe(trained: TrainedClip, *, format: str) -> Architecture:
    """The architecture of a model of ours.

    Raises ValueError, naming the part, if it is none that `format` can express: only CLIP's own
    two transformers and a byte-pair tokenizer have a place there.
    """
    model, tokenizer = trained.model, trained.tokenizer
    _needs(model, CLIP, format, "model")
    _needs(model.image, VisionTransformer, format, "model.image")
    _needs(model.text, TextTransformer, format, "model.text")
    _needs(tokenizer, BpeTokenizer, format, "tokenizer")
    if tokenizer.vocab_size > model.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.text only "
            f"{model.text.vocab_size}: this run's tokenizer was changed after training"
        )
    return Architecture(
        image=_tower(model.image, format, "model.image"),
        text=_tower(model.text, format, "model.text"),
        image_size=model.image.image_size,
        patch_size=model.image.patch_embed.patch_size,
        vocab_size=model.text.vocab_size,
        context_length=model.text.context_length,
        embed_dim=model.image_projection.out_features,
        eot=tokenizer.eot,
    )


def _needs(part: object, kind: type, format: str, name: str) -> None:
    """Exactly this class: a subclass computes something else."""
    if type(part) is not kind:
        raise ValueError(
            f"format={format} cannot express {name} = {type(part).__name__}, only "
            f"{kind.__name__}; format=features works for any model"
        )


def _tower(tower: VisionTransformer | TextTransformer, format: str, name: str) -> Tower:
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS:
            raise ValueError(f"format={format}: {name} has a LayerNorm with eps {module.eps}")
    block = tower.transformer.blocks[0]
    known = {kind: activation for activation, kind in ACTIVATIONS.items()}
    kind = type(block.mlp.activation)
    activation = known.get(kind, kind.__name__)
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"format={format} cannot express {name}.activation = {activation}")
    return Tower(
        width=block.attention.out.in_features,
        layers=len(tower.transformer.blocks),
        heads=block.attention.heads,
        hidden=block.mlp.up.out_features,
        activation=activation,
    )


def renamed(weights: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Weights as float32 under other names: each (regular expression, replacement) in order."""
    out = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor.detach().float().cpu().contiguous()
    assert len(out) == len(weights), "two weights got one name"
    return out


def model_weights(model: CLIP) -> dict[str, Tensor]:
    """The state_dict, with the logit scale as the model uses it: clamped."""
    with torch.no_grad():
        return model.state_dict() | {"log_logit_scale": model.logit_scale.log()}


def safetensors_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """A .safetensors file; transformers refuses one that does not say it is torch's."""
    return safetensors.torch.save(dict(weights), metadata={"format": "pt"})
