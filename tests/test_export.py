"""Exported models, loaded by the software they are for, embed as ours do.

open_clip runs in an environment of its own: tests/peer/test_open_clip.py.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
)

from pipeline.data.images import ImageTransform
from pipeline.data.tokenizer import BpeTokenizer, clean_caption, train_bpe
from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import Tower
from pipeline.formats.features import Features
from pipeline.formats.open_clip import OpenClip
from pipeline.formats.transformers import Transformers
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BlockStyle
from pipeline.models.vit import VisionTransformer
from pipeline.shards import Record, write_manifest, write_shard

CAPTIONS = [
    "a",
    "",
    "!!! wow !",
    "A photo of a red panda, eating",
    "猫 😀 &amp; caf\u00e9",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "<|endoftext|> in the middle",
]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def small_bpe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(CAPTIONS * 3, vocab_size=560, directory=directory)
    return str(directory)


def make(path, *, activation="gelu", text_activation=None, mlp_ratio=4.0, max_logit_scale=100.0):
    """A small model with every parameter off its initial value, so that a mix-up shows."""
    torch.manual_seed(0)
    tokenizer = BpeTokenizer(path=path, context_length=14)
    image = VisionTransformer(
        image_size=24, patch_size=8, width=32, layers=3, heads=4, activation=activation
    )
    text = TextTransformer(
        vocab_size=tokenizer.vocab_size,
        context_length=14,
        width=24,
        layers=2,
        heads=2,
        mlp_ratio=mlp_ratio,
        activation=text_activation or activation,
    )
    model = CLIP(image=image, text=text, embed_dim=20, max_logit_scale=max_logit_scale)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    transform = ImageTransform(image_size=24, mean=MEAN, std=STD)
    return TrainedClip(model=model, tokenizer=tokenizer, transform=transform)


def picture(width, height, seed=0):
    sink = io.BytesIO()
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("path", ["clip", "small"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_transformers_embeds_as_we_do(path, activation, small_bpe, tmp_path):
    trained = make("clip" if path == "clip" else small_bpe, activation=activation)
    Transformers().write(trained, tmp_path)
    theirs, loaded = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values()), loaded
    assert theirs.config.text_config.eos_token_id == trained.tokenizer.eot

    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = trained.model.encode_image(pixels)
        image_embed = theirs.get_image_features(pixels).pooler_output
        torch.testing.assert_close(normal(image_embed), ours, atol=1e-5, rtol=0)
        assert ours.std() > 0.1  # not one constant vector
        # all their ways to fill a batch: alone, to the longest, to the context length
        expected = trained.text_embed(CAPTIONS)
        assert (expected[0] - expected[3]).abs().max() > 0.1
        cleaned = [clean_caption(text).replace("<|endoftext|>", "eot") for text in CAPTIONS]
        expected = trained.text_embed(cleaned)
        for padding in ("longest", "max_length"):
            tokens = tokenizer(
                cleaned, padding=padding, truncation=True, max_length=14, return_tensors="pt"
            )
            text_embed = theirs.get_text_features(**tokens).pooler_output
            torch.testing.assert_close(normal(text_embed), expected, atol=1e-5, rtol=0)
        for text, row in zip(cleaned, expected, strict=True):
            tokens = tokenizer(text, truncation=True, max_length=14, return_tensors="pt")
            text_embed = theirs.get_text_features(**tokens).pooler_output
            torch.testing.assert_close(normal(text_embed)[0], row, atol=1e-5, rtol=0)
        # and our own token ids, padded with 0
        text_embed = theirs.get_text_features(trained.tokenizer(CAPTIONS)).pooler_output
        torch.testing.assert_close(
            normal(text_embed), trained.text_embed(CAPTIONS), atol=1e-5, rtol=0
        )
    torch.testing.assert_close(theirs.logit_scale.exp(), trained.model.logit_scale)


def normal(embed):
    return embed / embed.norm(dim=-1, keepdim=True)


def test_transformers_prepares_images_as_we_do(small_bpe, tmp_path):
    trained = make(small_bpe)
    Transformers().write(trained, tmp_path)
    for loader in (AutoImageProcessor, CLIPProcessor):
        processor = loader.from_pretrained(tmp_path)
        for width, height in ((24, 24), (64, 64), (90, 60), (50, 71), (17, 20)):
            data = picture(width, height)
            ours = trained.transform.normalise(trained.transform.evaluate(data)[None])
            image = Image.open(io.BytesIO(data))
            theirs = processor(images=image, return_tensors="pt").pixel_values
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0, msg=f"{width}x{height}")


def test_transformers_takes_different_activations_and_any_mlp_width(small_bpe, tmp_path):
    trained = make(small_bpe, text_activation="quick_gelu", mlp_ratio=2.7)
    Transformers().write(trained, tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path)
    with torch.no_grad():
        text_embed = theirs.get_text_features(trained.tokenizer(CAPTIONS)).pooler_output
    expected = trained.text_embed(CAPTIONS)
    torch.testing.assert_close(normal(text_embed), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [Transformers, OpenClip])
def test_the_exported_logit_scale_is_the_clamped_one(kind, small_bpe, tmp_path):
    trained = make(small_bpe, max_logit_scale=20.0)
    with torch.no_grad():
        trained.model.log_logit_scale.fill_(5.0)
    kind().write(trained, tmp_path)
    (weights,) = (load_file(path) for path in tmp_path.glob("*.safetensors"))
    torch.testing.assert_close(weights["logit_scale"].exp(), torch.tensor(20.0))


@pytest.mark.parametrize("kind", [Transformers, OpenClip])
def test_an_export_is_a_function_of_the_model(kind, small_bpe, tmp_path):
    for name in ("first", "second"):
        kind().write(make(small_bpe), tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


class OtherTower(VisionTransformer):
    """Computes something else under the same names."""


@pytest.mark.parametrize("kind", [Transformers, OpenClip])
def test_what_cannot_be_expressed_is_named(kind, small_bpe, tmp_path):
    trained = make(small_bpe)
    trained.model.image = OtherTower(image_size=24, patch_size=8, width=32, layers=1, heads=1)
    with pytest.raises(ValueError, match=r"cannot express model\.image = OtherTower"):
        kind().write(trained, tmp_path)
    trained = make(small_bpe)
    trained.model.text.transformer.blocks[0].mlp.activation = nn.ReLU()
    with pytest.raises(ValueError, match=r"model\.text\.activation = \['ReLU', 'gelu'\], only"):
        kind().write(trained, tmp_path)
    trained = make(small_bpe)
    trained.model.text.ln_final.eps = 1e-6
    with pytest.raises(ValueError, match=r"model\.text\.block\.norm_eps = \[1e-05, 1e-06\]"):
        kind().write(trained, tmp_path)
    trained = make(small_bpe)
    trained.tokenizer = BpeTokenizer(path="clip", context_length=14)
    with pytest.raises(ValueError, match=r"tokenizer has 49408 ids, model\.text only"):
        kind().write(trained, tmp_path)
    trained.tokenizer = str.split
    with pytest.raises(ValueError, match="cannot express tokenizer"):
        kind().write(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    r"model\.image\.pooling = map, only class_token or mean;": (
        OpenClip,
        {"pooling": "map"},
    ),
    r"model\.image\.pooling = mean, only class_token;": (Transformers, {"pooling": "mean"}),
    r"model\.image\.ln_pre = False, only True;": (Transformers, {"ln_pre": False}),
    r"model\.image\.rotary_grid = 4, only None;": (OpenClip, {"rotary_grid": 4}),
    r"model\.image\.activation = swiglu, only gelu": (OpenClip, {"activation": "swiglu"}),
    r"model\.image\.block\.norm = rms, only layer;": (
        OpenClip,
        {"block": BlockStyle(norm="rms")},
    ),
    r"model\.image\.block\.norm_place = after, only before;": (
        OpenClip,
        {"block": BlockStyle(norm_place="after")},
    ),
    r"model\.image\.block\.sub_norm = True, only False;": (
        Transformers,
        {"block": BlockStyle(sub_norm=True)},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_without_a_place_are_refused(message, small_bpe, tmp_path):
    kind, options = REFUSED[message]
    trained = make(small_bpe)
    trained.model.image = VisionTransformer(
        image_size=24, patch_size=8, width=32, layers=2, heads=4, **options
    )
    with pytest.raises(ValueError, match=message + ".*format=features works"):
        kind().write(trained, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_heads_without_a_place_are_refused(small_bpe, tmp_path):
    trained = make(small_bpe)
    towers = {"image": trained.model.image, "text": trained.model.text}
    for head, kind, message in (
        ({"init_logit_bias": -10.0}, Transformers, "logit_bias.*format=open_clip can"),
        ({"image_projection": "biased"}, Transformers, "image_projection = biased"),
        ({"text_projection": "biased"}, Transformers, "text_projection = biased"),
        ({"image_projection": "biased"}, OpenClip, "image_projection = biased"),
    ):
        trained.model = CLIP(**towers, embed_dim=20, **head)
        with pytest.raises(ValueError, match=message):
            kind().write(trained, tmp_path)


def test_options_that_transformers_has_are_exported(small_bpe, tmp_path):
    """Fixed positions, another eps, no biases where it has some, a bias where it has none."""
    trained = make(small_bpe)
    torch.manual_seed(2)
    trained.model = CLIP(
        image=VisionTransformer(
            image_size=24,
            patch_size=8,
            width=32,
            layers=2,
            heads=4,
            activation="gelu_tanh",
            positions="sincos",
            patch_bias=True,
            block=BlockStyle(norm_eps=1e-3, qkv_bias="query_value"),
        ),
        text=trained.model.text,
        embed_dim=32,
        image_projection="none",
    )
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    Transformers().write(trained, tmp_path)
    theirs, loaded = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values()), loaded
    pixels = torch.randn(5, 3, 24, 24)
    with torch.no_grad():
        image_embed = theirs.get_image_features(pixels).pooler_output
        expected = trained.model.encode_image(pixels)
    assert expected.std() > 0.05
    torch.testing.assert_close(normal(image_embed), expected, atol=1e-5, rtol=0)


def test_open_clip_has_one_switch_for_the_activation(small_bpe, tmp_path):
    with pytest.raises(ValueError, match=r"two activations: model\.image has gelu, model\.text"):
        OpenClip().write(make(small_bpe, text_activation="quick_gelu"), tmp_path)


def test_mlp_ratio_gives_the_hidden_width_again():
    for width in (24, 48, 96, 384, 768):
        for hidden in range(width, 5 * width):
            tower = Tower(width=width, layers=1, heads=1, hidden=hidden, traits={})
            assert int(width * tower.mlp_ratio) == hidden


def write_shards(directory):
    """Two shards of three and two pairs."""
    pairs = [
        Record(f"{n:032x}", picture(40 + n, 30, n), "png", text, {})
        for n, text in enumerate(CAPTIONS[:5])
    ]
    shards = [write_shard(directory, "shard-000000", pairs[:3])]
    shards.append(write_shard(directory, "shard-000001", pairs[3:]))
    write_manifest(directory, {"num_samples": 5, "shards": shards, "steps": []})
    return pairs


def test_features_are_a_row_a_pair(small_bpe, tmp_path):
    trained = make(small_bpe)
    pairs = write_shards(tmp_path / "shards")
    Features(shards=str(tmp_path / "shards"), batch_size=2).write(trained, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["shard-000000.parquet", "shard-000001.parquet"]
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["uid", "image_embed", "text_embed"]
    assert table["uid"].to_pylist() == [pair.uid for pair in pairs]
    for column, expected in (
        ("image_embed", trained.image_embed([pair.image for pair in pairs])),
        ("text_embed", trained.text_embed([pair.caption for pair in pairs])),
    ):
        found = torch.tensor(table[column].to_pylist())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_features_of_an_empty_shard(small_bpe, tmp_path):
    shards = [write_shard(tmp_path / "shards", "shard-000000", [])]
    write_manifest(tmp_path / "shards", {"num_samples": 0, "shards": shards, "steps": []})
    Features(shards=str(tmp_path / "shards")).write(make(small_bpe), tmp_path / "out")
    assert pq.read_table(tmp_path / "out").num_rows == 0


@pytest.fixture
def run(small_bpe, tmp_path):
    """A run directory as pipeline.train leaves it."""
    trained = make(small_bpe)
    tower = {
        "width": 32,
        "layers": 3,
        "heads": 4,
        "_target_": "pipeline.models.vit.VisionTransformer",
    }
    text = {
        "width": 24,
        "layers": 2,
        "heads": 2,
        "_target_": "pipeline.models.text.TextTransformer",
    }
    config = {
        "model": {
            "_target_": "pipeline.models.clip.CLIP",
            "embed_dim": 20,
            "image": tower | {"image_size": 24, "patch_size": 8},
            "text": text | {"context_length": 14, "vocab_size": trained.tokenizer.vocab_size},
        },
        "tokenizer": {
            "_target_": "pipeline.data.tokenizer.BpeTokenizer",
            "path": small_bpe,
            "context_length": 14,
        },
        "transform": {"_target_": "pipeline.data.images.ImageTransform", "image_size": 24},
    }
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    weights = {f"model.{name}": tensor for name, tensor in trained.model.state_dict().items()}
    torch.save({"state_dict": weights}, folder / "checkpoints" / "step-1.ckpt")
    return folder


def command(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.export", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_what_it_says(run, tmp_path):
    """And nothing else: no outputs/ folder of Hydra's, no log file."""
    (tmp_path / "cwd").mkdir()
    done = command(tmp_path / "cwd", f"run={run}", "format=open_clip", "out=exported")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "cwd").iterdir()] == ["exported"]
    written = tmp_path / "cwd" / "exported"
    assert "open_clip_model.safetensors" in done.stdout
    config = json.loads((written / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["head_width"] == 8
    assert set(config["preprocess_cfg"]) == {"mean", "std", "interpolation", "resize_mode"}


def test_auto_classes_give_our_logits_from_a_picture_and_a_string(small_bpe, tmp_path):
    trained = make(small_bpe)
    Transformers().write(trained, tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(model).__name__ == "CLIPModel" and type(processor).__name__ == "CLIPProcessor"
    pictures = [picture(48, 48, seed=1), picture(64, 48, seed=2)]
    texts = ["a red panda", "eating"]
    given = processor(
        text=texts,
        images=[Image.open(io.BytesIO(data)) for data in pictures],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        theirs = model(**given).logits_per_image
        scale = trained.model.logit_scale
    ours = scale * trained.image_embed(pictures) @ trained.text_embed(texts).T
    assert ours.std() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5 * float(scale), rtol=0)


def test_the_card_is_filled_from_the_run(run, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    entry = write_shard(tmp_path / "shards", "shard-000000", [])
    step = {"name": "balance", "read": 1200, "kept": 1000, "dropped": {"head": 200}}
    write_manifest(tmp_path / "shards", {"num_samples": 1000, "shards": [entry], "steps": [step]})
    more = {"name": "first", "data": {"shards": str(tmp_path / "shards")}, "seed": 3}
    more |= {"samples_seen": 25600, "recipe_info": {"source": "ours | a|b"}}
    OmegaConf.save(OmegaConf.merge(config, more), run / "config.yaml")
    (run / "eval").mkdir()
    (run / "eval" / "zero_shot.json").write_text(
        json.dumps({"metrics": {"eval/zero_shot/top1": 0.125}})
    )
    (run / "eval" / "zero_shot.ema.json").write_text(
        json.dumps({"metrics": {"eval/zero_shot/top1": 0.25}, "weights": "ema"})
    )
    (run / "metrics.jsonl").write_text('{"perf/pairs_per_second": 1000.0}\n{"torn')
    for kind in ("open_clip", "transformers"):
        out = tmp_path / kind
        done = command(tmp_path, f"run={run}", f"format={kind}", f"out={out}", "license=cc-by-4.0")
        assert done.returncode == 0, done.stderr
        card = ModelCard.load(out / "README.md")
        assert card.data.library_name == kind and card.data.license == "cc-by-4.0"
        assert card.data.pipeline_tag == "zero-shot-image-classification"
        text = card.text
        for words in (
            "# first",
            "| balance | 1,200 | 1,000 | head 200 |",
            "zero_shot/top1 | 0.1250",
            "zero_shot/top1, ema weights | 0.2500",
        ):
            assert words in text, words
        for words in ("25,600", "a\\|b", "1,000", "import", "sha256"):
            assert words in text, words
        load = text.partition("```python\n")[2].partition("```")[0]
        compile(load, "card", "exec")  # what it says is Python
    without = command(tmp_path, f"run={run}", "format=open_clip", "out=other")
    assert without.returncode == 0
    assert "not stated: ask whoever trained it" in (tmp_path / "other" / "README.md").read_text()


def test_a_hub_that_cannot_be_reached_loses_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "0" * 30)
    words = (f"run={run}", "format=transformers", "out=out", "push_to=someone/model")
    done = command(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert "push_to=someone/model" in done.stderr and "The export is whole in out" in done.stderr
    assert "hf_0" not in done.stdout + done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_command_names_what_is_missing(run, tmp_path):
    done = command(tmp_path, f"run={run}", "format=features", "out=exported")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "format.shards=" in done.stderr
    done = command(tmp_path, f"run={run}", "format=onnx", "out=exported")
    assert done.returncode == 2
    assert "transformers" in done.stderr  # the known ones are listed
    done = command(tmp_path, "run=nowhere", "format=open_clip", "out=exported")
    assert done.returncode == 2
    assert "nowhere is no run directory" in done.stderr
