"""Export to transformers: CLIPModel, CLIPProcessor and AutoTokenizer load the directory."""

from pathlib import Path

from torch import nn

from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import (
    Architecture,
    Tower,
    describe,
    plain_weights,
    safetensors_bytes,
)
from pipeline.formats.names import TRANSFORMERS
from pipeline.models.clip import CLIP
from pipeline.shards import write_atomically, write_json

ABLE_BLOCK = {
    "activation": ["quick_gelu", "gelu_tanh"],
    "block.norm_eps": None,
    "block.qkv_bias": ["query_value", "none"],
}
ABLE_IMAGE = {"positions": ["sincos", "sincos_moco"], "patch_bias": [True], **ABLE_BLOCK}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class Transformers:
    """A directory for `CLIPModel.from_pretrained`, with its tokenizer and image processor."""

    library = "transformers"
    how_to_load = """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("DIRECTORY")
processor = AutoProcessor.from_pretrained("DIRECTORY")
"""

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write it to `out`. Raises ValueError if CLIPModel cannot express the model.

        Their tokenizer repairs no mojibake and no HTML entities: pass captions through
        `pipeline.data.tokenizer.clean_caption` first where that matters. Their processor puts
        transparent pixels on black, ours on white.
        """
        architecture = describe(
            trained, format="transformers", able_image=ABLE_IMAGE, able_text=ABLE_BLOCK
        )
        _check_head(trained.model)
        weights = TRANSFORMERS.write(plain_weights(trained.model))
        write_atomically(out / "model.safetensors", safetensors_bytes(weights))
        write_json(out / "config.json", model_config(architecture, trained.model))
        write_json(out / "preprocessor_config.json", preprocessor_config(trained))
        trained.tokenizer.save(out)


def _check_head(model: CLIP) -> None:
    if model.logit_bias is not None:
        raise ValueError(
            "format=transformers cannot express a logit_bias: CLIPModel has none; "
            "format=open_clip can"
        )
    for name in ("image_projection", "text_projection"):
        projection = getattr(model, name)
        if isinstance(projection, nn.Linear) and projection.bias is not None:
            raise ValueError(
                f"format=transformers cannot express {name} = biased, only linear or none; "
                "format=features works for any model"
            )


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
