"""A run directory with a model of random weights."""

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.config import build

MODEL = {
    "_target_": "pipeline.models.clip.CLIP",
    "embed_dim": 12,
    "image": {
        "_target_": "pipeline.models.vit.VisionTransformer",
        "image_size": 16,
        "patch_size": 8,
        "width": 16,
        "layers": 1,
        "heads": 2,
    },
    "text": {
        "_target_": "pipeline.models.text.TextTransformer",
        "vocab_size": 49408,
        "context_length": 12,
        "width": 16,
        "layers": 1,
        "heads": 2,
    },
}


@pytest.fixture(scope="session")
def save_checkpoint():
    return write_checkpoint


def write_checkpoint(model, path):
    path.parent.mkdir(exist_ok=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"state_dict": weights, "global_step": 1, "optimizer_states": [{"state": {}}]}
    torch.save(content, path)


def make_run(tmp_path):
    config = OmegaConf.create(
        {
            "name": "n",
            "model": MODEL,
            "tokenizer": {
                "_target_": "pipeline.data.tokenizer.BpeTokenizer",
                "path": "clip",
                "context_length": 12,
            },
            "transform": {"_target_": "pipeline.data.images.ImageTransform", "image_size": 16},
        }
    )
    OmegaConf.save(config, tmp_path / "config.yaml")
    torch.manual_seed(0)
    write_checkpoint(build(config.model), tmp_path / "checkpoints" / "step-10.ckpt")
    return tmp_path


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))
