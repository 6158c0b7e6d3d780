"""What a tower is made of, read off its modules, under the names its constructor has for them."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from pipeline.models.attention import QueryValueBias
from pipeline.models.mlp import ACTIVATIONS, Mlp, SwigluMlp
from pipeline.models.norm import NORMS, LayerScale
from pipeline.models.pooling import WITHOUT_WEIGHTS, AttentionPool
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BLOCKS, Block
from pipeline.models.vit import VisionTransformer

# CLIP's choices: what every format can express
CLIPS_BLOCK = {
    "activation": "gelu",
    "block.norm": "layer",
    "block.norm_eps": 1e-5,
    "block.norm_place": "before",
    "block.qk_norm": False,
    "block.sub_norm": False,
    "block.layer_scale": None,
    "block.qkv_bias": "all",
}
CLIPS_IMAGE = {
    "class_token": True,
    "pooling": "class_token",
    "norm_before_pooling": False,
    "positions": "learned",
    "rotary_grid": None,
    "ln_pre": True,
    "patch_bias": False,
    **CLIPS_BLOCK,
}
CLIPS_TEXT = {"causal": True, "pooling": "eot", "eot_id": None, "pad_id": None, **CLIPS_BLOCK}
# SigLIP's
SIGLIPS_BLOCK = CLIPS_BLOCK | {"activation": "gelu_tanh", "block.norm_eps": 1e-6}
SIGLIPS_IMAGE = {
    **CLIPS_IMAGE,
    "class_token": False,
    "pooling": "map",
    "norm_before_pooling": True,
    "ln_pre": False,
    "patch_bias": True,
    **SIGLIPS_BLOCK,
}
SIGLIPS_TEXT = {**CLIPS_TEXT, "causal": False, "pooling": "last", **SIGLIPS_BLOCK}


def image_traits(tower: VisionTransformer) -> dict[str, Any]:
    """The options of an image tower, as CLIPS_IMAGE lists them."""
    pooling = _name_of(tower.pool, {**WITHOUT_WEIGHTS, "map": AttentionPool})
    return {
        "class_token": tower.class_token is not None,
        "pooling": pooling,
        # One token is normed alike before and after it is picked.
        "norm_before_pooling": tower.norm_before_pooling and pooling != "class_token",
        "positions": tower.positions,
        "rotary_grid": None if tower.rotary is None else tower.rotary.grid,
        "ln_pre": not isinstance(tower.ln_pre, nn.Identity),
        "patch_bias": tower.patch_embed.bias is not None,
        **_block_traits(tower),
    }


def text_traits(tower: TextTransformer) -> dict[str, Any]:
    """The options of a text tower, as CLIPS_TEXT lists them."""
    return {
        "causal": tower.causal,
        "pooling": tower.pooling,
        "eot_id": tower.eot_id,
        # Causal attention does not look past the end of text, whatever stands there.
        "pad_id": None if tower.causal and tower.pooling == "eot" else tower.pad_id,
        **_block_traits(tower),
    }


def refuse(
    traits: Mapping[str, Any],
    clips: Mapping[str, Any],
    able: Mapping[str, Collection[Any] | None],
    *,
    format: str,
    part: str,
) -> None:
    """Raise ValueError for an option that is neither that of `clips` nor among those the format is
    able to express: option -> values, None for any.
    """
    for option, value in traits.items():
        allowed = able.get(option, ())
        if value == clips[option] or (allowed is None and not isinstance(value, list)):
            continue
        if allowed is not None and value in allowed:
            continue
        others = ["any other for all blocks"] if allowed is None else allowed
        known = " or ".join(str(known) for known in [clips[option], *others])
        raise ValueError(
            f"format={format} cannot express {part}.{option} = {value}, only {known}; "
            "format=features works for any model"
        )


def _name_of(module: nn.Module, classes: Mapping[str, type]) -> str:
    return {kind: name for name, kind in classes.items()}.get(type(module), type(module).__name__)


def _only(found: set[Any]) -> Any:
    """The one value that all blocks share, else all of them, which no format can express."""
    return found.pop() if len(found) == 1 else sorted(found, key=str)


def _block_traits(tower: VisionTransformer | TextTransformer) -> dict[str, Any]:
    blocks = list(tower.transformer.blocks)
    norms = [module for module in tower.modules() if type(module) in NORMS.values()]
    return {
        "activation": _only({_activation(block) for block in blocks}),
        "block.norm": _only({_name_of(norm, NORMS) for norm in norms}),
        "block.norm_eps": _only({norm.eps for norm in norms}),
        "block.norm_place": _only({_name_of(block, BLOCKS) for block in blocks}),
        "block.qk_norm": _only({_present(block.attention.norm_query) for block in blocks}),
        "block.sub_norm": _only({_present(block.attention.norm_mixed) for block in blocks}),
        "block.layer_scale": _only({_layer_scale(block) for block in blocks}),
        "block.qkv_bias": _only({_biases(block.attention.qkv) for block in blocks}),
    }


def _present(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _layer_scale(block: Block) -> float | None:
    return block.gain_1.start if isinstance(block.gain_1, LayerScale) else None


def _biases(qkv: nn.Linear) -> str:
    if qkv.bias is None:
        return "none"
    return "query_value" if isinstance(qkv, QueryValueBias) else "all"


def _activation(block: Block) -> str:
    if isinstance(block.mlp, SwigluMlp):
        return "swiglu"
    assert isinstance(block.mlp, Mlp)
    activation = block.mlp.activation
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _name_of(activation, {"quick_gelu": ACTIVATIONS["quick_gelu"]})
