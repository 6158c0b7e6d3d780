"""Our exports in open_clip itself, in an environment of its own (`make peer`).

The interpreter is PAIRWRIGHT_PEER_PYTHON, or .venv-peer/bin/python in the repository.
"""

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.data.images import ImageTransform
from pipeline.data.tokenizer import BpeTokenizer, train_bpe
from pipeline.evals.trained import TrainedClip
from pipeline.formats.open_clip import OpenClip
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BlockStyle
from pipeline.models.vit import VisionTransformer

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PAIRWRIGHT_PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))
CAPTIONS = [
    "a",
    "",
    "!!! wow !",
    "A photo of a red panda, eating",
    "ΔΙΑΣ",  # the last letter's lower case depends on its place
    "猫 😀 &amp;amp; caf\u00e9 donâ€™t ΣΊΣΥΦΟΣ 👩🏽‍🚀 It's 123",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
]
# Sizes whose margin beside the centre crop is even: the peers put an odd pixel on different sides.
SIZES = [(24, 24), (64, 64), (90, 60), (36, 72), (24, 30)]

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no peer environment at {PYTHON}: run `make peer`"
    ),
]


def pool_captions(count):
    shard = sorted((ROOT / "examples" / "emoji" / "pool").glob("*.parquet"))[0]
    return pq.read_table(shard, columns=["caption"])["caption"].to_pylist()[:count]


def make(path, activation, *, image=None, text=None, **clip):
    """A small model with every parameter off its initial value, so that a mix-up shows."""
    torch.manual_seed(0)
    tokenizer = BpeTokenizer(path=path, context_length=14)
    towers = {
        "image": VisionTransformer(
            image_size=24,
            patch_size=8,
            width=32,
            layers=3,
            heads=4,
            **{"activation": activation} | (image or {}),
        ),
        "text": TextTransformer(
            vocab_size=tokenizer.vocab_size,
            context_length=14,
            width=24,
            layers=2,
            heads=2,
            mlp_ratio=2.7,
            **{"activation": activation} | (text or {}),
        ),
    }
    model = CLIP(**towers, embed_dim=clip.pop("embed_dim", 20), **clip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    transform = ImageTransform(image_size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    return TrainedClip(model=model, tokenizer=tokenizer, transform=transform)


def pictures():
    rng = np.random.default_rng(0)
    images = []
    for width, height in SIZES:
        pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(sink, "PNG")
        images.append(sink.getvalue())
    return images


def in_open_clip(*jobs):
    """What open_clip makes of each (exported directory, inputs, folder for files), in one
    process.
    """
    arguments = []
    for directory, inputs, folder in jobs:
        torch.save(inputs, folder / "inputs.pt")
        arguments += [directory, folder / "inputs.pt", folder / "outputs.pt"]
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("open_clip_features.py"), *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / "outputs.pt", weights_only=True) for _, _, folder in jobs]


KINDS = [(words, kind) for words in ("clip", "small") for kind in ("gelu", "quick_gelu")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(vocabulary, activation) -> (our model, its inputs, what open_clip makes of its export)."""
    captions = CAPTIONS + pool_captions(1000)
    small = str(tmp_path_factory.mktemp("bpe"))
    train_bpe(captions, vocab_size=1000, directory=small)
    models, jobs = [], []
    for vocabulary, activation in KINDS:
        folder = tmp_path_factory.mktemp("exported")
        trained = make("clip" if vocabulary == "clip" else small, activation)
        OpenClip().write(trained, folder / "exported")
        inputs = {
            "pixels": torch.randn(5, 3, 24, 24),
            "images": pictures(),
            "captions": captions,
            "token_ids": trained.tokenizer(captions),
        }
        models.append(trained)
        jobs.append((folder / "exported", inputs, folder))
    found = zip(models, (inputs for _, inputs, _ in jobs), in_open_clip(*jobs), strict=True)
    return dict(zip(KINDS, found, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_open_clip_embeds_as_we_do(kind, exported):
    trained, inputs, theirs = exported[kind]
    images, captions = inputs["images"], inputs["captions"]
    with torch.no_grad():
        image_embed = trained.model.encode_image(inputs["pixels"])
    text_embed = trained.text_embed(captions)
    assert image_embed.std() > 0.1
    for name, ours in (
        ("image_embed", image_embed),
        ("text_embed", text_embed),
        ("own_text_embed", text_embed),  # raw captions, through the exported tokenizer
        ("from_pretrained_text_embed", text_embed),
        ("logit_scale", trained.model.logit_scale),
    ):
        difference = (theirs[name] - ours).abs().max()
        assert difference < 1e-5, f"{name} differs by {difference}"

    pixels = torch.stack([trained.transform.evaluate(image) for image in images])
    prepared = trained.transform.normalise(pixels)
    torch.testing.assert_close(theirs["prepared"], prepared, atol=1e-5, rtol=0)


def test_our_clip_tokenizer_is_theirs(tmp_path):
    """Raw captions, cleaning included, id by id; only literal names of special tokens differ."""
    trained = make("clip", "gelu")
    OpenClip().write(trained, tmp_path / "exported")
    captions = CAPTIONS + pool_captions(3000)
    tokenizer = BpeTokenizer(context_length=77)
    inputs = {
        "pixels": torch.randn(1, 3, 24, 24),
        "images": pictures()[:1],
        "captions": captions,
        "token_ids": trained.tokenizer(captions),
    }
    (theirs,) = in_open_clip((tmp_path / "exported", inputs, tmp_path))
    assert theirs["tokenizer"] == "SimpleTokenizer"
    assert torch.equal(theirs["simple_token_ids"], tokenizer(captions))
    assert torch.equal(theirs["token_ids"], trained.tokenizer(captions))


OPTIONS = {
    "clipa": {
        "image": {
            "activation": "gelu_tanh",
            "pooling": "mean",
            "positions": "sincos_moco",
            "ln_pre": False,
            "patch_bias": True,
            "block": BlockStyle(norm_eps=1e-3, qkv_bias="none"),
        },
        "text": {"activation": "gelu_tanh", "causal": False, "pooling": "last"},
        "text_projection": "biased",
        "init_logit_bias": -10.0,
    },
    "normed": {
        "image": {
            "pooling": "mean",
            "norm_before_pooling": True,
            "positions": "sincos",
            "block": BlockStyle(sub_norm=True, qk_norm=True, layer_scale=0.3),
        },
        "text": {
            "pooling": "first",
            "causal": False,
            "block": BlockStyle(sub_norm=True, norm_eps=1e-3, qkv_bias="query_value"),
        },
        "image_projection": "none",
        "embed_dim": 32,
    },
    "eot_by_id": {"text": {"eot_id": 300}},
}


def test_options_that_open_clip_has_are_exported(tmp_path):
    path = str(tmp_path / "bpe")
    train_bpe(pool_captions(100), vocab_size=600, directory=path)
    jobs, models = [], []
    for name, options in OPTIONS.items():
        trained = make(path, "gelu", **options)
        (tmp_path / name).mkdir()
        OpenClip().write(trained, tmp_path / name / "exported")
        token_ids = trained.tokenizer(CAPTIONS)
        token_ids[:, 7] = 300
        inputs = {
            "pixels": torch.randn(5, 3, 24, 24),
            "images": pictures()[:1],
            "captions": CAPTIONS,
            "token_ids": token_ids,
        }
        jobs.append((tmp_path / name / "exported", inputs, tmp_path / name))
        models.append(trained.model)
    for (_, inputs, folder), model, theirs in zip(jobs, models, in_open_clip(*jobs), strict=True):
        with torch.no_grad():
            embeds = model(inputs["pixels"], inputs["token_ids"])
        for name, ours in zip(("image_embed", "text_embed"), embeds, strict=True):
            assert ours.std() > 0.05
            difference = (theirs[name] - ours).abs().max()
            assert difference < 1e-5, f"{folder.name}: {name} differs by {difference}"
        if model.logit_bias is not None:
            assert theirs["logit_bias"] == model.logit_bias.detach()
