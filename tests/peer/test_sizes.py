"""Our sizes have as many parameters as open_clip's models of the same name."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from pipeline.config import CONF, build

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PAIRWRIGHT_PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))
NAMES = {
    "vit_s_32": "ViT-S-32",
    "vit_s_16": "ViT-S-16",
    "vit_b_32": "ViT-B-32",
    "vit_b_16": "ViT-B-16",
    "vit_l_16": "ViT-L-16",
    "vit_l_14": "ViT-L-14",
    "vit_l_14_336": "ViT-L-14-336",
    "vit_h_14": "ViT-H-14",
    "vit_g_14": "ViT-g-14",
    "vit_bigg_14": "ViT-bigG-14",
    "siglip_b_16": "ViT-B-16-SigLIP",
    "siglip_l_16": "ViT-L-16-SigLIP-256",
    "siglip_so400m_14": "ViT-SO400M-14-SigLIP",
    "eva_g_14": "EVA01-g-14",
    "eva02_b_16": "EVA02-B-16",
    "eva02_l_14": "EVA02-L-14",
    "eva02_l_14_336": "EVA02-L-14-336",
    "eva_e_14": "EVA02-E-14",
    "eva_e_14_plus": "EVA02-E-14-plus",
    "clipa_h_14": "ViT-H-14-CLIPA",
    "metaclip2_h_14": "ViT-H-14-worldwide-quickgelu",
}


def parameters(name: str) -> int:
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = compose(config_name=f"model/{name}").model
    with torch.device("meta"):
        model = build(config)
    fixed = model.image.position if model.image.positions != "learned" else None
    extra = 0 if fixed is None else fixed.numel()  # a frozen parameter there, a buffer here
    return sum(parameter.numel() for parameter in model.parameters()) + extra


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(not PYTHON.exists(), reason=f"no peer environment at {PYTHON}: `make peer`")
def test_sizes_are_open_clips():
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("open_clip_sizes.py"), *NAMES.values()],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = [int(line) for line in done.stdout.split()]
    assert {name: parameters(name) for name in NAMES} == dict(zip(NAMES, theirs, strict=True))
