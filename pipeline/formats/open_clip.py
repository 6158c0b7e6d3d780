"""Export to open_clip: `open_clip.create_model_and_transforms("local-dir:DIRECTORY")` loads it."""

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import (
    Architecture,
    Tower,
    describe,
    plain_weights,
    safetensors_bytes,
)
from pipeline.formats.names import OPEN_CLIP
from pipeline.models.clip import CLIP
from pipeline.shards import write_atomically, write_json

ABLE_BLOCK = {
    "activation": ["quick_gelu", "gelu_tanh"],
    "block.norm_eps": None,
    "block.qk_norm": [True],
    "block.sub_norm": [True],
    "block.layer_scale": None,
    "block.qkv_bias": ["query_value", "none"],
}
ABLE_IMAGE = {
    "pooling": ["mean"],
    "norm_before_pooling": [True],
    "positions": ["sincos", "sincos_moco"],
    "ln_pre": [False],
    "patch_bias": [True],
    **ABLE_BLOCK,
}
ABLE_TEXT = {"causal": [False], "pooling": ["first", "last"], "eot_id": None, **ABLE_BLOCK}


class OpenClip:
    """A directory for open_clip's "local-dir:" names (open_clip >= 2.31), tokenizer included."""

    library = "open_clip"
    how_to_load = """
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIRECTORY")
tokenizer = open_clip.get_tokenizer("local-dir:DIRECTORY")
"""

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write it to `out`. Raises ValueError if open_clip cannot express the model.

        A vocabulary other than CLIP's own is written in transformers' files, which
        `open_clip.get_tokenizer("local-dir:DIRECTORY")` then needs transformers to read.
        """
        architecture = describe(
            trained, format="open_clip", able_image=ABLE_IMAGE, able_text=ABLE_TEXT
        )
        _check_projections(trained.model)
        weights = OPEN_CLIP.write(plain_weights(trained.model))
        if not _is_biased(trained.model.text_projection):
            weights["text_projection"] = weights.pop("text_projection.weight").T
        own_vocabulary = trained.tokenizer.path != "clip"
        transform = trained.transform
        config = {
            "model_cfg": model_config(architecture, trained.model, own_vocabulary=own_vocabulary),
            "preprocess_cfg": {
                "mean": list(transform.mean),
                "std": list(transform.std),
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        }
        write_atomically(out / "open_clip_model.safetensors", safetensors_bytes(weights))
        write_json(out / "open_clip_config.json", config)
        if own_vocabulary:
            trained.tokenizer.save(out)


def _is_biased(projection: nn.Module) -> bool:
    return isinstance(projection, nn.Linear) and projection.bias is not None


def _check_projections(model: CLIP) -> None:
    if _is_biased(model.image_projection):
        raise ValueError(
            "format=open_clip cannot express image_projection = biased for a tower of its own; "
            "format=features works for any model"
        )


def model_config(
    architecture: Architecture, model: CLIP, *, own_vocabulary: bool
) -> dict[str, object]:
    """`model_cfg`. Raises ValueError for two activations: open_clip has one switch for both."""
    image, text = architecture.image, architecture.text
    quick = {tower.activation == "quick_gelu" for tower in (image, text)}
    if len(quick) > 1:
        raise ValueError(
            "format=open_clip cannot express two activations: model.image has "
            f"{image.activation}, model.text {text.activation}; format=transformers can"
        )
    # For a "local-dir:" model open_clip looks for the tokenizer beside its config, whatever the
    # name says. "lower": it would else leave case to transformers, whose lower case differs.
    tokenizer = {"hf_tokenizer_name": ".", "tokenizer_kwargs": {"clean": "lower"}}
    bias = model.logit_bias
    return {
        "embed_dim": architecture.embed_dim,
        "quick_gelu": quick.pop(),
        **({} if bias is None else {"init_logit_bias": float(bias.detach())}),
        "vision_cfg": {
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "width": image.width,
            "layers": image.layers,
            "head_width": image.width // image.heads,
            "mlp_ratio": image.mlp_ratio,
            **_image_options(image),
        },
        "text_cfg": {
            "context_length": architecture.context_length,
            "vocab_size": architecture.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
            **_text_options(text, biased=_is_biased(model.text_projection)),
            **(tokenizer if own_vocabulary else {}),
        },
    }


def _image_options(tower: Tower) -> dict[str, Any]:
    """What differs from CLIP, in open_clip's words; nothing for CLIP's own tower."""
    traits, options = tower.traits, _block_options(tower)
    if not traits["ln_pre"]:
        options["no_ln_pre"] = True
    if traits["positions"] != "learned":
        options["pos_embed_type"] = "sin_cos_2d"  # fixed; the file holds the table's values
    if traits["pooling"] == "mean":
        options["pool_type"] = "avg"
        options["final_ln_after_pool"] = not traits["norm_before_pooling"]
    return options


def _text_options(tower: Tower, *, biased: bool) -> dict[str, Any]:
    traits, options = tower.traits, _block_options(tower)
    if not traits["causal"]:
        options["no_causal_mask"] = True
    if traits["pooling"] != "eot":
        options["pool_type"] = traits["pooling"]
    elif traits["eot_id"] is not None:
        options |= {"pool_type": "eos", "eos_id": traits["eot_id"]}
    if biased:
        options["proj_bias"] = True
    return options


def _block_options(tower: Tower) -> dict[str, Any]:
    traits, options = tower.traits, {}
    if traits["block.norm_eps"] != 1e-5:
        options["norm_kwargs"] = {"eps": traits["block.norm_eps"]}
    if traits["activation"] == "gelu_tanh":
        options["act_kwargs"] = {"approximate": "tanh"}
    if traits["block.layer_scale"] is not None:
        options["ls_init_value"] = traits["block.layer_scale"]
    if traits["block.qk_norm"]:
        options["qk_norm"] = True
    if traits["block.sub_norm"]:
        options |= {"scale_attn_inner": True, "scale_fc": True}
    return options
