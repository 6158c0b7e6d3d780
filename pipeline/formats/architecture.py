"""What of a model other software must be told, and a refusal of what it cannot express."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.data.tokenizer import BpeTokenizer
from pipeline.evals.trained import TrainedClip
from pipeline.formats.traits import (
    CLIPS_IMAGE,
    CLIPS_TEXT,
    image_traits,
    refuse,
    text_traits,
)
from pipeline.metric import Cosine
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.views import ViewsCLIP
from pipeline.models.vit import VisionTransformer

Able = Mapping[str, Collection[Any] | None]


@dataclass(frozen=True)
class Tower:
    """One transformer. `hidden` is the width inside its MLPs; `traits`: see formats.traits."""

    width: int
    layers: int
    heads: int
    hidden: int
    traits: Mapping[str, Any]

    @property
    def activation(self) -> str:
        return self.traits["activation"]

    @property
    def mlp_ratio(self) -> float:
        """The factor from which int(width * factor) gives `hidden` again."""
        ratio = self.hidden / self.width
        return ratio if int(self.width * ratio) == self.hidden else (self.hidden + 0.5) / self.width


@dataclass(frozen=True)
class Architecture:
    """A CLIP of two transformers, in numbers. eot: the tokenizer's end of text, if it has one."""

    image: Tower
    text: Tower
    image_size: int
    patch_size: int
    vocab_size: int
    context_length: int
    embed_dim: int
    eot: int | None


def describe(
    trained: TrainedClip,
    *,
    format: str,
    able_image: Able,
    able_text: Able,
    usual: tuple[Mapping[str, Any], Mapping[str, Any]] = (CLIPS_IMAGE, CLIPS_TEXT),
    tokenizer: type = BpeTokenizer,
) -> Architecture:
    """The architecture of a model of ours.

    usual: options of both towers that `format` has; able_image, able_text: those beside them that
    it can express, see traits.refuse.
    Raises ValueError, naming the part, for any other: only our two transformers and a tokenizer of
    that class have a place there.
    """
    model, words = trained.model, trained.tokenizer
    if type(model) is not ViewsCLIP:  # which encodes one image and one text as CLIP does
        _needs(model, CLIP, format, "model")
    if not isinstance(model.metric, Cosine) or not model.metric.inner:
        raise ValueError(
            f"format={format} cannot express model.metric = {model.metric.name}: what loads it "
            "compares by cosine; format=features writes the embeddings and says their metric"
        )
    _needs(model.image, VisionTransformer, format, "model.image")
    _needs(model.text, TextTransformer, format, "model.text")
    _needs(words, tokenizer, format, "tokenizer")
    if words.vocab_size > model.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} ids, model.text only "
            f"{model.text.vocab_size}: this run's tokenizer was changed after training"
        )
    image, text = image_traits(model.image), text_traits(model.text)
    refuse(image, usual[0], able_image, format=format, part="model.image")
    refuse(text, usual[1], able_text, format=format, part="model.text")
    return Architecture(
        image=_tower(model.image, image),
        text=_tower(model.text, text),
        image_size=model.image.image_size,
        patch_size=model.image.patch_embed.patch_size,
        vocab_size=model.text.vocab_size,
        context_length=model.text.context_length,
        embed_dim=model.embed_dim,
        eot=getattr(words, "eot", None),
    )


def _needs(part: object, kind: type, format: str, name: str) -> None:
    """Exactly this class: a subclass computes something else."""
    if type(part) is not kind:
        raise ValueError(
            f"format={format} cannot express {name} = {type(part).__name__}, only "
            f"{kind.__name__}; format=features works for any model"
        )


def _tower(tower: VisionTransformer | TextTransformer, traits: Mapping[str, Any]) -> Tower:
    block = tower.transformer.blocks[0]
    return Tower(
        width=tower.width,
        layers=len(tower.transformer.blocks),
        heads=block.attention.heads,
        hidden=block.mlp.up.out_features,
        traits=traits,
    )


def plain_weights(model: CLIP) -> dict[str, Tensor]:
    """The state_dict as float32 on the CPU, in the form of a tower whose only biases and positions
    are CLIP's; the model computes the same.

    The logit scale is the clamped one. A missing key bias, or all three, are zeros; a bias of the
    patch embedding is part of every patch's position, and fixed positions are written out; a
    projection that is none is the identity.
    """
    with torch.no_grad():
        weights = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.partition(".")[0] not in model.training_only
        } | {"log_logit_scale": model.logit_scale.log()}
        weights = {name: tensor.detach().float().cpu() for name, tensor in weights.items()}
        for name in [name for name in weights if name.endswith(".qkv.weight")]:
            bias = weights.get(name.replace("weight", "bias"))
            weights[name.replace("weight", "bias")] = _three_biases(bias, len(weights[name]))
        if model.image.position is not None:
            weights["image.position"] = model.image.position.detach().float().cpu().clone()
            bias = weights.pop("image.patch_embed.bias", None)
            if bias is not None:
                weights["image.position"][model.image.num_prefix :] += bias
    for name in ("image_projection", "text_projection"):
        if isinstance(getattr(model, name), nn.Identity):
            weights[f"{name}.weight"] = torch.eye(model.embed_dim)
    return weights


def _three_biases(bias: Tensor | None, length: int) -> Tensor:
    """Query's, key's and value's, (length,)."""
    if bias is None:
        return torch.zeros(length)
    if len(bias) == length:
        return bias
    query, value = bias.chunk(2)
    return torch.cat([query, torch.zeros_like(query), value])


def safetensors_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """A .safetensors file; transformers refuses one that does not say it is torch's."""
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    return safetensors.torch.save(whole, metadata={"format": "pt"})
