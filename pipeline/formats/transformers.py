"""Export to transformers: CLIPModel or SiglipModel, their processors and AutoTokenizer load the
directory.
"""

from pathlib import Path

from torch import nn

from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import (
    Architecture,
    describe,
    plain_weights,
    safetensors_bytes,
)
from pipeline.formats.names import TRANSFORMERS
from pipeline.formats.siglip import preprocessor_config, tower_config, write_siglip
from pipeline.models.clip import CLIP
from pipeline.models.pooling import AttentionPool
from pipeline.shards import write_atomically, write_json

ABLE_BLOCK = {
    "activation": ["quick_gelu", "gelu_tanh"],
    "block.norm_eps": None,
    "block.qkv_bias": ["query_value", "none"],
}
ABLE_IMAGE = {"positions": ["sincos", "sincos_moco"], "patch_bias": [True], **ABLE_BLOCK}


class Transformers:
    """A directory for `CLIPModel.from_pretrained`, with its tokenizer and image processor."""

    library = "transformers"
    how_to_load = """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("DIRECTORY")
processor = AutoProcessor.from_pretrained("DIRECTORY")
shape = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
print(model(**processor(images=[...], text=[...], **shape)).logits_per_image)
"""

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write it to `out`: a SiglipModel for an image tower with an attention pool, else a
        CLIPModel. Raises ValueError if that cannot express the model.

        Their CLIP tokenizer repairs no mojibake and no HTML entities: pass captions through
        `pipeline.data.tokenizer.clean_caption` first where that matters. Their processor puts
        transparent pixels on black, ours on white.
        """
        if isinstance(getattr(trained.model.image, "pool", None), AttentionPool):
            write_siglip(trained, out)
            return
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
