"""Export to transformers' SiglipModel, and what its files share with CLIPModel's."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.data.hf_tokenizer import HfTokenizer
from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import (
    Architecture,
    Tower,
    describe,
    plain_weights,
    safetensors_bytes,
)
from pipeline.formats.names import SIGLIP
from pipeline.formats.traits import SIGLIPS_IMAGE, SIGLIPS_TEXT
from pipeline.shards import write_atomically, write_json

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
ABLE_BLOCK = {
    "activation": list(ACTIVATIONS),
    "block.norm_eps": None,
    "block.qkv_bias": ["query_value", "none"],
}
ABLE_IMAGE = {"positions": ["sincos", "sincos_moco"], "patch_bias": [False], **ABLE_BLOCK}


def write_siglip(trained: TrainedClip, out: Path) -> None:
    """A directory for `SiglipModel.from_pretrained`. Raises ValueError if it cannot express the
    model: its text tower sees all its positions, padding too, so the tokenizer must be one whose
    padding goes with it.
    """
    architecture = describe(
        trained,
        format="transformers",
        able_image=ABLE_IMAGE,
        able_text=ABLE_BLOCK,
        usual=(SIGLIPS_IMAGE, SIGLIPS_TEXT),
        tokenizer=HfTokenizer,
    )
    model = trained.model
    if not isinstance(model.image_projection, nn.Identity):
        raise ValueError(
            "format=transformers cannot express image_projection behind an attention pool: "
            "SiglipModel has none; set model.image_projection=none, or take format=features"
        )
    weights = plain_weights(model)
    del weights["image_projection.weight"]
    weights.setdefault("image.patch_embed.bias", torch.zeros(architecture.image.width))
    weights.setdefault("text_projection.bias", torch.zeros(architecture.embed_dim))
    weights["image.pool.probe"] = weights["image.pool.probe"][None]
    weights["log_logit_scale"] = weights["log_logit_scale"][None]
    weights["logit_bias"] = weights.get("logit_bias", torch.zeros(())).reshape(1)
    named = SIGLIP.write(weights)
    write_atomically(out / "model.safetensors", safetensors_bytes(named))
    write_json(out / "config.json", siglip_config(architecture, trained.tokenizer.pad_id))
    write_json(out / "preprocessor_config.json", preprocessor_config(trained))
    trained.tokenizer.save(out)


def siglip_config(architecture: Architecture, pad_id: int) -> dict[str, Any]:
    """config.json of a SiglipModel."""
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "dtype": "float32",
        "vision_config": {
            "model_type": "siglip_vision_model",
            **tower_config(architecture.image),
            "num_channels": 3,
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
        },
        "text_config": {
            "model_type": "siglip_text_model",
            **tower_config(architecture.text),
            "projection_size": architecture.embed_dim,
            "vocab_size": architecture.vocab_size,
            "max_position_embeddings": architecture.context_length,
            "pad_token_id": pad_id,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    }


def tower_config(tower: Tower) -> dict[str, object]:
    """What both towers' configs name alike."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.hidden,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.traits["block.norm_eps"],
        "attention_dropout": 0.0,
    }


def preprocessor_config(trained: TrainedClip) -> dict[str, object]:
    """preprocessor_config.json: shorter side to image_size, bicubic, centre crop."""
    transform = trained.transform
    size = transform.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # PIL's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
