"""What a checkpoint's config says that its weights do not show: heads, activation, a norm's eps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from pipeline.formats.siglip import ACTIVATIONS
from pipeline.formats.traits import image_traits, text_traits
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer

Declared = dict[str, dict[str, Any]]  # "image" and "text" -> option -> value


def declared(path: str | Path) -> Declared:
    """From the config beside the weights, of transformers or open_clip; empty without one."""
    directory = Path(path) if Path(path).is_dir() else Path(path).parent
    if (directory / "open_clip_config.json").is_file():
        content = json.loads((directory / "open_clip_config.json").read_text())
        return _open_clip(content["model_cfg"])
    config = directory / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("model_type") in ("clip", "siglip"):
        return _transformers(AutoConfig.from_pretrained(directory))
    return {}


def _open_clip(config: Mapping[str, Any]) -> Declared:
    image, text = config["vision_cfg"], config["text_cfg"]
    found: Declared = {"image": {}, "text": {}}
    # a tower of timm's or transformers' is described by its name alone
    if "timm_model_name" not in image:
        found["image"] = _open_clip_tower(image, config.get("quick_gelu", False))
        found["image"]["heads"] = image.get("width", 768) // image.get("head_width", 64)
    if "hf_model_name" not in text:
        found["text"] = _open_clip_tower(text, config.get("quick_gelu", False))
        found["text"]["heads"] = text.get("heads", 8)
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
        }
        for name, tower in (("image", config.vision_config), ("text", config.text_config))
    }


def differences(model: CLIP, path: str | Path, part: str) -> list[str]:
    """Where our towers are not what the checkpoint's config says, a line each. part: "" for both
    towers, "image." or "text." for one.
    """
    found = []
    for name, options in declared(path).items():
        tower = getattr(model, name)
        if not f"{name}.".startswith(part) or not isinstance(
            tower, VisionTransformer | TextTransformer
        ):
            continue
        own = image_traits(tower) if name == "image" else text_traits(tower)
        own["heads"] = tower.transformer.blocks[0].attention.heads
        found += [
            f"{path}: model.{name}.{option} was {value}, here {own[option]}"
            for option, value in options.items()
            if own[option] != value
        ]
    return found
