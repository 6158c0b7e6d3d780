"""Export to transformers: CLIPModel, CLIPProcessor and AutoTokenizer load the directory."""

from pathlib import Path

import torch
from torch import Tensor

from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import (
    LAYER_NORM_EPS,
    Architecture,
    Tower,
    describe,
    model_weights,
    renamed,
    safetensors_bytes,
)
from pipeline.models.clip import CLIP
from pipeline.shards import write_atomically, write_json

RULES = [
    (r"^image\.patch_embed", "vision_model.embeddings.patch_embedding"),
    (r"^image\.class_token", "vision_model.embeddings.class_embedding"),
    (r"^image\.position", "vision_model.embeddings.position_embedding.weight"),
    (r"^image\.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
    (r"^image\.ln_post", "vision_model.post_layernorm"),
    (r"^image\.transformer\.blocks", "vision_model.encoder.layers"),
    (r"^text\.token_embed", "text_model.embeddings.token_embedding"),
    (r"^text\.position", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final", "text_model.final_layer_norm"),
    (r"^text\.transformer\.blocks", "text_model.encoder.layers"),
    (r"\.norm_([12])\.", r".layer_norm\1."),
    (r"\.attention\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
    (r"^image_projection", "visual_projection"),
    (r"^log_logit_scale", "logit_scale"),
]


class Transformers:
    """A directory for `CLIPModel.from_pretrained`, with its tokenizer and image processor."""

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write it to `out`. Raises ValueError if CLIPModel cannot express the model.

        Their tokenizer repairs no mojibake and no HTML entities: pass captions through
        `pipeline.data.tokenizer.clean_caption` first where that matters. Their processor puts
        transparent pixels on black, ours on white.
        """
        architecture = describe(trained, format="transformers")
        weights = renamed(split_qkv(model_weights(trained.model)), RULES)
        write_atomically(out / "model.safetensors", safetensors_bytes(weights))
        write_json(out / "config.json", model_config(architecture, trained.model))
        write_json(out / "preprocessor_config.json", preprocessor_config(trained))
        trained.tokenizer.save(out)


def split_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fused input projection as three."""
    out = {}
    for name, tensor in weights.items():
        if ".qkv." in name:
            for part, piece in zip("qkv", torch.chunk(tensor, 3), strict=True):
                out[name.replace(".qkv.", f".{part}.")] = piece
        else:
            out[name] = tensor
    return out


def model_config(architecture: Architecture, model: CLIP) -> dict[str, object]:
    """config.json of a CLIPModel."""
    shared = {"projection_dim": architecture.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": architecture.embed_dim,
        "logit_scale_init_value": float(model.logit_scale.detach().log()),
        "vision_config": {
            "model_type": "clip_vision_model",
            **tower_config(architecture.image),
            **shared,
            "num_channels": 3,
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **tower_config(architecture.text),
            **shared,
            "vocab_size": architecture.vocab_size,
            "max_position_embeddings": architecture.context_length,
            # The true id, at whose first occurrence they pool; 2 would mean "old file: argmax".
            "eos_token_id": architecture.eot,
            "bos_token_id": architecture.eot - 1,
            "pad_token_id": architecture.eot,
        },
    }


def tower_config(tower: Tower) -> dict[str, object]:
    """What both towers' configs name alike. Their "gelu" and "quick_gelu" are ours."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.hidden,
        "hidden_act": tower.activation,
        "layer_norm_eps": LAYER_NORM_EPS,
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
