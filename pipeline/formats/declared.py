"""What is known of a checkpoint and not seen in its weights: heads, activation, pooling, masks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, PreTrainedConfig

from pipeline.config import build
from pipeline.evals.trained import run_config
from pipeline.formats.checkpoint_file import is_torchscript
from pipeline.formats.siglip import ACTIVATIONS
from pipeline.formats.traits import (
    CLIPS_IMAGE,
    CLIPS_TEXT,
    SIGLIPS_IMAGE,
    SIGLIPS_TEXT,
    image_traits,
    text_traits,
)
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.targets import foreign_targets

Declared = dict[str, dict[str, Any]]  # "image" and "text" -> option -> value

TOWERS = {"image": VisionTransformer, "text": TextTransformer}
POOLED = ("causal", "pooling", "norm_before_pooling")
ELSE = ("heads", "activation", "positions", "rotary_grid", "eot_id", "pad_id")
UNSEEN = (*POOLED, *ELSE, "block.norm_eps", "block.norm_place")


def _pooled(image: Mapping[str, Any], text: Mapping[str, Any]) -> Declared:
    traits = {"image": image, "text": text}
    return {
        name: {option: own[option] for option in POOLED if option in own}
        for name, own in traits.items()
    }


# model_type in transformers -> how its towers pool
TRANSFORMERS = {
    "clip": _pooled(CLIPS_IMAGE, CLIPS_TEXT),
    "chinese_clip": _pooled(CLIPS_IMAGE, CLIPS_TEXT),
    "siglip": _pooled(SIGLIPS_IMAGE, SIGLIPS_TEXT),
}
CLIPS_PIXELS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
# A TorchScript archive is how OpenAI publishes CLIP.
OPENAI = {
    name: {"activation": "quick_gelu", **pooled} for name, pooled in TRANSFORMERS["clip"].items()
}


def declared(path: str | Path) -> Declared:
    """From the config beside the weights, of transformers, open_clip or a run of ours, or from what
    a file is; empty where nothing says it.
    """
    path = Path(path)
    if path.is_file() and is_torchscript(path):
        return OPENAI
    directory = path if path.is_dir() else path.parent
    if (directory / "open_clip_config.json").is_file():
        content = json.loads((directory / "open_clip_config.json").read_text())
        return _open_clip(content["model_cfg"])
    config = directory / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("model_type") in TRANSFORMERS:
        return _transformers(AutoConfig.from_pretrained(directory))
    run = directory.parent if directory.name == "checkpoints" else directory
    if (run / "checkpoints").is_dir() and (run / "config.yaml").is_file():
        return _run(run_config(run, path if path.is_file() else None, allow_foreign_targets=True))
    return {}


def pixel_statistics(path: str | Path) -> dict[str, list[float]]:
    """What pixels in [0, 1] were normalised by, "mean" and "std", from what lies beside the weights
    or from what a file is; what nothing says is not there.
    """
    path = Path(path)
    if path.is_file() and is_torchscript(path):
        return CLIPS_PIXELS
    directory = path if path.is_dir() else path.parent
    run = directory.parent if directory.name == "checkpoints" else directory
    found: Mapping[str, Any] = {}
    if (directory / "open_clip_config.json").is_file():
        content = json.loads((directory / "open_clip_config.json").read_text())
        found = content.get("preprocess_cfg", {})
    elif (directory / "preprocessor_config.json").is_file():
        content = json.loads((directory / "preprocessor_config.json").read_text())
        found = {name: content.get(f"image_{name}") for name in ("mean", "std")}
    elif (run / "checkpoints").is_dir() and (run / "config.yaml").is_file():
        config = run_config(run, path if path.is_file() else None, allow_foreign_targets=True)
        # a run of an older version had CLIP's, without a word
        found = CLIPS_PIXELS | dict(config.get("transform") or {})
    return {name: list(found[name]) for name in ("mean", "std") if found.get(name)}


def _open_clip(config: Mapping[str, Any]) -> Declared:
    image, text = config["vision_cfg"], config["text_cfg"]
    found: Declared = {"image": {}, "text": {}}
    # a tower of timm's or transformers' is described by its name alone
    if "timm_model_name" not in image:
        found["image"] = _open_clip_tower(image, config.get("quick_gelu", False))
        found["image"]["heads"] = image.get("width", 768) // image.get("head_width", 64)
        mean = image.get("pool_type", "tok") == "avg"
        found["image"]["pooling"] = "mean" if mean else "class_token"
        after = image.get("final_ln_after_pool", False)
        found["image"]["norm_before_pooling"] = mean and not after
    if "hf_model_name" not in text:
        found["text"] = _open_clip_tower(text, config.get("quick_gelu", False))
        found["text"]["heads"] = text.get("heads", 8)
        pooling = text.get("pool_type", "argmax")
        found["text"]["pooling"] = {"argmax": "eot", "eos": "eot"}.get(pooling, pooling)
        if pooling == "eos":  # else the largest id, whichever that is
            found["text"]["eot_id"] = text.get("eos_id", 2)
        found["text"]["causal"] = not text.get("no_causal_mask", False)
    return found


def _open_clip_tower(tower: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "activation": "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu",
        "block.norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _transformers(config: PreTrainedConfig) -> Declared:
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()}
    return {
        name: {
            "activation": ours.get(tower.hidden_act, tower.hidden_act),
            "block.norm_eps": tower.layer_norm_eps,
            "heads": tower.num_attention_heads,
            **TRANSFORMERS[config.model_type][name],
        }
        for name, tower in (("image", config.vision_config), ("text", config.text_config))
    }


def _run(config: DictConfig) -> Declared:
    """Of a run of ours: all of it, of a tower whose class is ours."""
    found: Declared = {}
    for name, kind in TOWERS.items():
        node = OmegaConf.select(config, f"model.{name}")
        own = isinstance(node, DictConfig) and not foreign_targets(node)
        if own and node.get("_target_") == f"{kind.__module__}.{kind.__name__}":
            with torch.device("meta"):
                traits = _traits(build(node))
            found[name] = {option: traits[option] for option in UNSEEN if option in traits}
    return found


def _traits(tower: VisionTransformer | TextTransformer) -> dict[str, Any]:
    traits = image_traits(tower) if isinstance(tower, VisionTransformer) else text_traits(tower)
    return traits | {"heads": tower.transformer.blocks[0].attention.heads}


def differences(model: CLIP, path: str | Path, part: str) -> dict[str, str]:
    """Where our towers are not what is known of the checkpoint: option -> a line. part: "" for both
    towers, "image." or "text." for one.
    """
    found = {}
    for name, options in declared(path).items():
        tower = getattr(model, name)
        if not f"{name}.".startswith(part) or not isinstance(tower, TOWERS[name]):
            continue
        own = _traits(tower)
        for option, value in options.items():
            if own[option] != value:
                line = f"{path}: model.{name}.{option} was {value}, here {own[option]}"
                found[f"{name}.{option}"] = line
    return found
