"""Export to open_clip: `open_clip.create_model_and_transforms("local-dir:DIRECTORY")` loads it."""

from pathlib import Path

from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import (
    Architecture,
    describe,
    model_weights,
    renamed,
    safetensors_bytes,
)
from pipeline.shards import write_atomically, write_json

RULES = [
    (r"^image\.patch_embed", "visual.conv1"),
    (r"^image\.class_token", "visual.class_embedding"),
    (r"^image\.position", "visual.positional_embedding"),
    (r"^image\.", "visual."),
    (r"^text\.token_embed", "token_embedding"),
    (r"^text\.position", "positional_embedding"),
    (r"^text\.", ""),
    (r"\.blocks\.", ".resblocks."),
    (r"\.norm_([12])\.", r".ln_\1."),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),
    (r"\.attention\.out\.", ".attn.out_proj."),
    (r"\.mlp\.up\.", ".mlp.c_fc."),
    (r"\.mlp\.down\.", ".mlp.c_proj."),
    (r"^image_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^log_logit_scale", "logit_scale"),
]
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the right


class OpenClip:
    """A directory for open_clip's "local-dir:" names (open_clip >= 2.31), tokenizer included."""

    def write(self, trained: TrainedClip, out: Path) -> None:
        """Write it to `out`. Raises ValueError if open_clip cannot express the model.

        A vocabulary other than CLIP's own is written in transformers' files, which
        `open_clip.get_tokenizer("local-dir:DIRECTORY")` then needs transformers to read.
        """
        architecture = describe(trained, format="open_clip")
        weights = renamed(model_weights(trained.model), RULES)
        for name in TRANSPOSED:
            weights[name] = weights[name].T.contiguous()
        own_vocabulary = trained.tokenizer.path != "clip"
        transform = trained.transform
        config = {
            "model_cfg": model_config(architecture, own_vocabulary=own_vocabulary),
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


def model_config(architecture: Architecture, *, own_vocabulary: bool) -> dict[str, object]:
    """`model_cfg`. Raises ValueError for two activations: open_clip has one switch for both."""
    image, text = architecture.image, architecture.text
    if image.activation != text.activation:
        raise ValueError(
            "format=open_clip cannot express two activations: model.image has "
            f"{image.activation}, model.text {text.activation}; format=transformers can"
        )
    # For a "local-dir:" model open_clip looks for the tokenizer beside its config, whatever the
    # name says. "lower": it would else leave case to transformers, whose lower case differs.
    tokenizer = {"hf_tokenizer_name": ".", "tokenizer_kwargs": {"clean": "lower"}}
    return {
        "embed_dim": architecture.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "width": image.width,
            "layers": image.layers,
            "head_width": image.width // image.heads,
            "mlp_ratio": image.mlp_ratio,
        },
        "text_cfg": {
            "context_length": architecture.context_length,
            "vocab_size": architecture.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
            **(tokenizer if own_vocabulary else {}),
        },
    }
