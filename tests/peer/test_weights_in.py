"""Checkpoints of open_clip and timm in our towers: the same embeddings, the same positions."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline.formats.initial import InitialWeights
from pipeline.models.clip import CLIP
from pipeline.models.hf_text import HfText
from pipeline.models.resize import resize_grid, resize_rows
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BlockStyle
from pipeline.models.vit import VisionTransformer

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PAIRWRIGHT_PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no peer environment at {PYTHON}: run `make peer`"
    ),
]
BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "max_position_embeddings": 20,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PATCHES = {"ln_pre": False, "patch_bias": True}
MODELS = {
    "open_clip": {"image": {"activation": "quick_gelu"}, "text": {"activation": "quick_gelu"}},
    "hf_text": {"image": {"activation": "quick_gelu"}, "text": BERT},
    "eva02": {
        "image": {
            "mlp_ratio": 8 / 3,
            "activation": "swiglu",
            "rotary_grid": 16,
            "block": BlockStyle(norm_eps=1e-6, qkv_bias="query_value", sub_norm=True),
            **PATCHES,
        },
        "image_projection": "biased",
    },
    "eva_g": {
        "image": {
            "mlp_ratio": 4.3637,
            "block": BlockStyle(norm_eps=1e-6, qkv_bias="query_value"),
            **PATCHES,
        },
        "image_projection": "biased",
    },
    "eva_e": {
        "image": {
            "mlp_ratio": 5.0,
            "block": BlockStyle(norm_eps=1e-6, qkv_bias="query_value", norm_place="after"),
            **PATCHES,
        },
        "image_projection": "biased",
    },
    "siglip": {
        "image": {
            "class_token": False,
            "pooling": "map",
            "norm_before_pooling": True,
            "block": BlockStyle(norm_eps=1e-6),
            **PATCHES,
        },
        "text": {"causal": False, "pooling": "last"},
        "image_projection": "none",
        "text_projection": "biased",
        "embed_dim": 48,
        "init_logit_bias": 0.0,
    },
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder of their models and what they compute."""
    folder = tmp_path_factory.mktemp("theirs")
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("open_clip_random.py"), folder],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "oracle.pt", weights_only=True)


def ours(options):
    options = dict(options)
    image, text = options.pop("image", {}), options.pop("text", {})
    return CLIP(
        image=VisionTransformer(image_size=32, patch_size=8, width=48, layers=2, heads=4, **image),
        text=HfText(config=text, context_length=14)
        if "model_type" in text
        else TextTransformer(
            vocab_size=300, context_length=14, width=24, layers=2, heads=2, **text
        ),
        embed_dim=options.pop("embed_dim", 20),
        **options,
    )


@pytest.mark.parametrize("name", MODELS)
def test_their_weights_embed_as_they_do(theirs, name):
    folder, oracle = theirs
    (path,) = folder.glob(f"{name}.[ps]*")
    model = ours(MODELS[name]).eval()
    report = InitialWeights(model=str(path)).apply(model)
    assert report.new == [] and report.unused == [] and report.resized == {}
    with torch.no_grad():
        image_embed, text_embed = model(oracle["pixels"], oracle["tokens"])
    for found, expected in zip((image_embed, text_embed), oracle[name], strict=True):
        assert found.std() > 0.05
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["eva02", "eva_g", "eva_e", "siglip"])
def test_timms_tower_by_itself(theirs, name):
    """Only the tower is there: the same weights as out of the whole model."""
    folder, _ = theirs
    whole, model = ours(MODELS[name]), ours(MODELS[name])
    InitialWeights(model=str(folder / f"{name}.safetensors")).apply(whole)
    report = InitialWeights(image=str(folder / f"{name}_tower.safetensors")).apply(model)
    assert report.unused == [] and not any(new.startswith("image.") for new in report.new)
    for key, tensor in whole.image.state_dict().items():
        assert torch.equal(model.image.state_dict()[key], tensor), key


def test_position_tables_are_resized_as_open_clip_does(theirs):
    for grid in (4, 7):
        found = theirs[1][f"resized to {grid}"]
        table = resize_grid(found["visual.positional_embedding before"], grid**2, prefix=1)
        torch.testing.assert_close(table, found["visual.positional_embedding"], atol=1e-6, rtol=0)
        table = resize_rows(found["positional_embedding before"], 14, lengthen="stretch")
        torch.testing.assert_close(table, found["positional_embedding"], atol=1e-6, rtol=0)
