"""Checkpoints as first weights. Those of open_clip and timm: tests/peer/test_weights_in.py."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel, CLIPConfig, CLIPModel

from pipeline.formats.checkpoint_file import load_weights
from pipeline.formats.declared import CLIPS_PIXELS, differences, pixel_statistics
from pipeline.formats.initial import InitialWeights
from pipeline.formats.names import OPEN_CLIP
from pipeline.models.clip import CLIP
from pipeline.models.hf_text import HfText
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BlockStyle
from pipeline.models.vit import VisionTransformer

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def ours(*, image_size=24, context_length=14, layers=2, seed=0, **clip):
    torch.manual_seed(seed)
    sizes = {"width": 32, "layers": layers, "heads": 4, "mlp_ratio": 2.0}
    model = CLIP(
        image=VisionTransformer(
            image_size=image_size, patch_size=8, activation="quick_gelu", **sizes
        ),
        text=TextTransformer(
            vocab_size=300, context_length=context_length, activation="quick_gelu", **sizes
        ),
        embed_dim=20,
        **clip,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch(image_size=24):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 299, (4, 14), generator=generator)
    tokens[:, 9:] = 299
    return torch.randn(4, 3, image_size, image_size, generator=generator), tokens


def saved(model, path):
    """In our checkpoints' layout, as the trainer leaves them."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights | {"objective.b": torch.ones(1)}}, path)
    return str(path)


@pytest.fixture
def clip_model(tmp_path):
    """(directory, a random CLIPModel)."""
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={**TOWER, "num_hidden_layers": 2, "image_size": 24, "patch_size": 8},
        text_config={
            **TOWER,
            "num_hidden_layers": 2,
            "vocab_size": 300,
            "max_position_embeddings": 14,
            "eos_token_id": 299,
        },
        projection_dim=20,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return str(tmp_path), model


def test_a_clip_model_of_transformers_embeds_as_it_did(clip_model):
    path, theirs = clip_model
    model, (pixels, tokens) = ours(seed=5), batch()
    report = InitialWeights(model=path).apply(model)
    assert report.new == [] and report.unused == []
    with torch.no_grad():
        found = model(pixels, tokens)
        expected = (
            theirs.get_image_features(pixels).pooler_output,
            theirs.get_text_features(tokens).pooler_output,
        )
    for one, other in zip(found, expected, strict=True):
        assert one.std() > 0.05
        other = torch.nn.functional.normalize(other, dim=-1)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.log_logit_scale, theirs.logit_scale)


def test_what_only_the_config_says_is_compared(clip_model, tmp_path):
    path, _ = clip_model
    model = ours(seed=5)
    model.text.transformer.blocks[0].attention.heads = 2
    for block in model.image.transformer.blocks:
        block.mlp.activation = torch.nn.GELU()
    with pytest.raises(ValueError, match="image.activation was quick_gelu, here gelu") as error:
        InitialWeights(model=path).apply(model)
    assert "model.text.heads was 4, here 2" in str(error.value)
    source = ours(seed=3)
    for name, key in (("image", "head_width"), ("text", "heads")):
        folder = as_open_clip(source, tmp_path / name, **{name: {key: 16}})
        with pytest.raises(ValueError, match=rf"model\.{name}\.heads was \d+, here 4"):
            InitialWeights(**{name: folder}).apply(ours(seed=5))
        other = {"image": "text", "text": "image"}[name]
        InitialWeights(**{other: folder}).apply(ours(seed=5))


def as_open_clip(model, folder, *, image=(), text=()):
    """A directory of open_clip, whose config has these options beside the sizes."""
    folder.mkdir()
    weights = OPEN_CLIP.write(model.state_dict())
    as_safetensors(
        {n: t.contiguous() for n, t in weights.items()}, folder / "open_clip_model.safetensors"
    )
    config = {
        "quick_gelu": True,
        "vision_cfg": {"width": 32, "head_width": 8, **dict(image)},
        "text_cfg": {"heads": 4, **dict(text)},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return str(folder)


HALF, CLIPS = [0.5, 0.5, 0.5], CLIPS_PIXELS["mean"]


def test_pixels_are_normalised_as_those_of_the_weights_were(tmp_path):
    path = as_open_clip(ours(seed=3), tmp_path / "x")
    words = {"mean": CLIPS, "std": CLIPS_PIXELS["std"]}
    assert InitialWeights(model=path, **words).apply(ours()).differs == []  # nothing says another
    config = tmp_path / "x" / "open_clip_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"preprocess_cfg": {"mean": HALF, "std": HALF}}))
    with pytest.raises(ValueError, match=r"2 things do not fit[^$]*transform\.mean was \[0\.5, 0"):
        InitialWeights(model=path, **words).apply(ours())
    InitialWeights(model=path, mean=HALF, std=HALF).apply(ours())
    InitialWeights(text=path, **words).apply(ours())
    may = {"may_differ": ["transform"]}
    assert len(InitialWeights(model=path, **words, **may).apply(ours()).differs) == 2


def test_pixel_statistics_of_transformers_and_of_runs(tmp_path):
    assert pixel_statistics(tmp_path) == {}
    (tmp_path / "checkpoints").mkdir()
    run = {"model": {}, "tokenizer": {}, "transform": {"image_size": 8}}
    OmegaConf.save(run, tmp_path / "config.yaml")
    assert pixel_statistics(tmp_path / "checkpoints" / "a.ckpt") == CLIPS_PIXELS
    run["transform"]["std"] = HALF
    OmegaConf.save(run, tmp_path / "config.yaml")
    assert pixel_statistics(tmp_path) == {"mean": CLIPS, "std": HALF}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": HALF}))
    assert pixel_statistics(tmp_path) == {"mean": HALF}


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"image": {"pool_type": "avg"}}, ["image.pooling", "image.norm_before_pooling"]),
        ({"image": {"pool_type": "avg", "final_ln_after_pool": True}}, ["image.pooling"]),
        ({"image": {"final_ln_after_pool": True}}, []),
        ({"text": {"no_causal_mask": True, "pool_type": "last"}}, ["text.pooling", "text.causal"]),
        ({"text": {"pool_type": "eos", "eos_id": 7}}, ["text.eot_id"]),
    ],
)
def test_open_clips_pooling_and_mask_are_compared(options, differ, tmp_path):
    path = as_open_clip(ours(seed=3), tmp_path / "x", **options)
    found = differences(ours(), path, "")
    assert sorted(found) == sorted(differ)
    if differ:
        with pytest.raises(ValueError, match=f"{len(differ)} things do not fit") as error:
            InitialWeights(model=path).apply(ours())
        assert all(f"model.{option} was " in str(error.value) for option in differ)
        report = InitialWeights(model=path, may_differ=[rf"^{o}$" for o in differ]).apply(ours())
        assert report.differs == list(found.values()) and "differs: " in str(report)


def test_pooling_of_transformers_models_is_compared(clip_model):
    path, _ = clip_model
    model = ours()
    model.text.causal, model.text.pooling = False, "last"
    assert sorted(differences(model, path, "")) == ["text.causal", "text.pooling"]
    assert differences(model, path, "image.") == {}


RUN = """
model:
  _target_: pipeline.models.clip.CLIP
  image:
    _target_: pipeline.models.vit.VisionTransformer
    {image_size: 24, patch_size: 8, width: 32, layers: 2, heads: 4, mlp_ratio: 2.0, IMAGE}
  text:
    _target_: pipeline.models.text.TextTransformer
    {vocab_size: 300, context_length: 14, width: 32, layers: 2, heads: 4, mlp_ratio: 2.0, TEXT}
  embed_dim: 20
tokenizer: {}
transform: {}
"""


def a_run(folder, image="", text=""):
    (folder / "checkpoints").mkdir(parents=True)
    saved(ours(seed=3), folder / "checkpoints" / "step-7.ckpt")
    lines = []
    for line in RUN.splitlines():
        if line.lstrip().startswith("{"):
            options = line.strip(" {}").replace("IMAGE", image).replace("TEXT", text)
            lines += [f"    {option}" for option in options.split(", ") if option]
        else:
            lines.append(line)
    (folder / "config.yaml").write_text("\n".join(lines))
    return folder


QUICK = "activation: quick_gelu"


def test_a_run_says_what_its_towers_were(tmp_path):
    good = a_run(tmp_path / "good", QUICK, QUICK)
    for path in (good, good / "checkpoints" / "step-7.ckpt"):
        assert InitialWeights(model=str(path)).apply(ours()).differs == []
    other = a_run(tmp_path / "other", f"{QUICK}, pooling: mean, rotary_grid: 8", "causal: false")
    for path in (other, other / "checkpoints" / "step-7.ckpt"):
        with pytest.raises(ValueError, match="image.pooling was mean, here class_token") as error:
            InitialWeights(model=str(path)).apply(ours())
        for words in (
            "image.rotary_grid was 8, here None",
            "text.causal was False, here True",
            "text.activation was gelu, here quick_gelu",
        ):
            assert words in str(error.value)
    with pytest.raises(ValueError, match="2 things do not fit"):
        InitialWeights(text=str(other)).apply(ours())
    # weights show it, and a fresh value would be no other model
    scaled = a_run(tmp_path / "scaled", f"{QUICK}, patch_bias: true", QUICK)
    assert differences(ours(), scaled, "") == {}


def test_openais_archive_has_its_activation(tmp_path):
    source = ours(seed=3)
    weights = OPEN_CLIP.write(source.state_dict())
    as_torchscript({n: t.contiguous() for n, t in weights.items()}, tmp_path / "x.pt")
    model = ours(seed=5)
    for block in model.text.transformer.blocks:
        block.mlp.activation = torch.nn.GELU()
    path = str(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="text.activation was quick_gelu, here gelu"):
        InitialWeights(text=path).apply(model)
    report = InitialWeights(text=path, may_differ=["text.activation"]).apply(model)
    assert "differs: " in str(report)


BERT = {"model_type": "bert", "vocab_size": 300, "max_position_embeddings": 20}


def test_a_chinese_clip_of_transformers_embeds_as_it_did(tmp_path):
    torch.manual_seed(0)
    sizes = {**TOWER, "num_hidden_layers": 2}
    theirs = ChineseCLIPModel(
        ChineseCLIPConfig(
            vision_config={**sizes, "image_size": 24, "patch_size": 8},
            text_config={**sizes, **BERT, "model_type": "chinese_clip_text_model"},
            projection_dim=20,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    text = HfText(config={**BERT, **sizes}, context_length=14, pooling="first")
    model, (pixels, tokens) = CLIP(image=ours().image, text=text, embed_dim=20).eval(), batch()
    report = InitialWeights(model=str(tmp_path)).apply(model)
    assert report.new == [] and report.unused == []
    with torch.no_grad():
        found = model(pixels, tokens)
        expected = (
            theirs.get_image_features(pixels).pooler_output,
            theirs.get_text_features(tokens, tokens != 0).pooler_output,
        )
    for one, other in zip(found, expected, strict=True):
        other = torch.nn.functional.normalize(other, dim=-1)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


EVA_BLOCK = {  # ours of a block -> EVA's own name of it
    "norm_1.weight": "norm1.weight",
    "norm_1.bias": "norm1.bias",
    "norm_2.weight": "norm2.weight",
    "norm_2.bias": "norm2.bias",
    "attention.out.weight": "attn.proj.weight",
    "attention.out.bias": "attn.proj.bias",
}
EVA_1 = EVA_BLOCK | {
    "attention.qkv.weight": "attn.qkv.weight",
    "mlp.up.weight": "mlp.fc1.weight",
    "mlp.up.bias": "mlp.fc1.bias",
    "mlp.down.weight": "mlp.fc2.weight",
    "mlp.down.bias": "mlp.fc2.bias",
}
EVA_2 = EVA_BLOCK | {
    "attention.norm_mixed.weight": "attn.inner_attn_ln.weight",
    "attention.norm_mixed.bias": "attn.inner_attn_ln.bias",
    "mlp.gate.weight": "mlp.w1.weight",
    "mlp.gate.bias": "mlp.w1.bias",
    "mlp.up.weight": "mlp.w2.weight",
    "mlp.up.bias": "mlp.w2.bias",
    "mlp.down.weight": "mlp.w3.weight",
    "mlp.down.bias": "mlp.w3.bias",
    "mlp.norm.weight": "mlp.ffn_ln.weight",
    "mlp.norm.bias": "mlp.ffn_ln.bias",
}
EVA_OUTSIDE = {
    "class_token": "cls_token",
    "position": "pos_embed",
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}


def eva(version, seed=0):
    torch.manual_seed(seed)
    second = version == 2
    image = VisionTransformer(
        image_size=24,
        patch_size=8,
        width=32,
        layers=2,
        heads=4,
        activation="swiglu" if second else "gelu",
        rotary_grid=16 if second else None,
        ln_pre=False,
        patch_bias=True,
        block=BlockStyle(norm_eps=1e-6, qkv_bias="query_value", sub_norm=second),
    )
    model = CLIP(image=image, text=ours().text, embed_dim=20, image_projection="biased")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def evas_own(tower, version):
    """As EVA's code names a tower's weights: modeling_pretrain.py and eva_vit_model.py."""
    weights = tower.state_dict()
    theirs = {name: weights[own] for own, name in EVA_OUTSIDE.items()}
    theirs["pos_embed"], theirs["cls_token"] = theirs["pos_embed"][None], weights["class_token"]
    for number in range(2):
        own, their = f"transformer.blocks.{number}.", f"blocks.{number}."
        for name, other in {1: EVA_1, 2: EVA_2}[version].items():
            theirs[their + other] = weights[own + name]
        query, value = weights[own + "attention.qkv.bias"].chunk(2)
        theirs[their + "attn.q_bias"], theirs[their + "attn.v_bias"] = query, value
        if version == 2:
            parts = weights[own + "attention.qkv.weight"].chunk(3)
            for part, piece in zip("qkv", parts, strict=True):
                theirs[f"{their}attn.{part}_proj.weight"] = piece
            theirs |= {f"{their}attn.rope.freqs_cos": torch.ones(9, 8)}
    return theirs


@pytest.mark.parametrize("version", [1, 2])
def test_evas_own_files(version, tmp_path):
    """Of masked pre-training, which has heads of its own, and of EVA-CLIP."""
    source = eva(version, seed=3)
    theirs = evas_own(source.image, version)
    masked = {"mask_token": torch.ones(1, 1, 32), "lm_head.weight": torch.ones(8, 32)}
    torch.save({"model": theirs | masked}, tmp_path / "masked.pt")
    model = eva(version, seed=5)
    report = InitialWeights(image=str(tmp_path / "masked.pt")).apply(model)
    assert report.unused == [] and not any(name.startswith("image.") for name in report.new)
    pixels, tokens = batch()
    with torch.no_grad():
        assert torch.equal(model.image(pixels), source.image(pixels))

    text = {n: t for n, t in source.state_dict().items() if n.startswith("text.")}
    text = {f"text.{name}": tensor for name, tensor in OPEN_CLIP.write(text).items()}
    torch.save(
        {f"visual.{name}": tensor for name, tensor in theirs.items()}
        | {"visual.head.weight": source.image_projection.weight.detach()}
        | {"visual.head.bias": source.image_projection.bias.detach()}
        | {"text.text_projection": source.text_projection.weight.detach().T}
        | {"logit_scale": source.log_logit_scale.detach()}
        | text,
        tmp_path / "clip.pt",
    )
    model = eva(version, seed=5)
    report = InitialWeights(model=str(tmp_path / "clip.pt")).apply(model)
    assert report.new == [] and report.unused == []
    with torch.no_grad():
        for found, expected in zip(model(pixels, tokens), source(pixels, tokens), strict=True):
            assert torch.equal(found, expected)


def test_each_tower_from_its_own_checkpoint(clip_model, tmp_path):
    """As EVA-CLIP starts: projections and scale stay new."""
    path, theirs = clip_model
    source = ours(seed=3)
    text = saved(source, tmp_path / "text.ckpt")
    model, before = ours(seed=5), ours(seed=5)
    report = InitialWeights(image=path, text=text).apply(model)
    assert report.new == ["log_logit_scale", "image_projection.weight", "text_projection.weight"]
    pixels, tokens = batch()
    with torch.no_grad():
        expected = theirs.vision_model(pixels).pooler_output
        torch.testing.assert_close(model.image(pixels), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.text(tokens), source.text(tokens))
    for name in report.new:
        assert torch.equal(model.state_dict()[name], before.state_dict()[name])


def as_safetensors(weights, path):
    save_file(weights, path)


def as_training_checkpoint(weights, path):
    weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 1, "optimizer": {"state": {}}, "state_dict": weights}, path)


def as_torchscript(weights, path):
    """OpenAI's way; three numbers are no weights."""
    module = torch.nn.Module()
    for name, tensor in weights.items():
        *parents, last = name.split(".")
        here = module
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, torch.nn.Module())
            here = getattr(here, parent)
        here.register_buffer(last, tensor)
    for name in ("input_resolution", "context_length", "vocab_size"):
        module.register_buffer(name, torch.tensor(7))
    torch.jit.script(module).save(str(path))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (as_safetensors, "x.safetensors"),
        (as_training_checkpoint, "x.pt"),
        (as_torchscript, "y.pt"),
    ],
)
def test_open_clips_names_in_any_file(write, name, tmp_path):
    source, model = ours(seed=3, init_logit_bias=-4.0), ours(seed=5, init_logit_bias=0.0)
    weights = OPEN_CLIP.write(source.state_dict())
    weights["text_projection"] = weights.pop("text_projection.weight").T
    write({n: t.contiguous() for n, t in weights.items()}, tmp_path / name)
    report = InitialWeights(model=str(tmp_path / name)).apply(model)
    assert report.new == [] and report.unused == []
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_tables_of_another_size_are_resized_and_said(tmp_path):
    source = ours(seed=3)
    model = ours(image_size=40, context_length=9, seed=5)
    report = InitialWeights(model=saved(source, tmp_path / "x.ckpt")).apply(model)
    assert report.resized == {"image.position": (10, 26), "text.position": (14, 9)}
    assert "resized: image.position, 10 -> 26 rows" in str(report)
    assert torch.equal(model.text.position, source.text.position[:9])


def test_a_run_directory_is_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    source, model = ours(seed=3), ours(seed=5)
    saved(source, tmp_path / "checkpoints" / "step-7.ckpt")
    assert "7 weights" not in str(InitialWeights(model=str(tmp_path)).apply(model))
    assert torch.equal(model.image.position, source.image.position)


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    path = saved(ours(seed=3), tmp_path / "x.ckpt")
    shallow, before = ours(layers=1, seed=5), ours(layers=1, seed=5)
    with pytest.raises(ValueError, match=r"image\.transformer\.blocks\.1\.norm_1\.weight unused"):
        InitialWeights(model=path).apply(shallow)
    for name, tensor in before.state_dict().items():
        assert torch.equal(shallow.state_dict()[name], tensor)
    InitialWeights(model=path, may_be_unused=[r"blocks\.1\."]).apply(shallow)

    deep = ours(layers=3)
    with pytest.raises(ValueError, match=r"text\.transformer\.blocks\.2\..*: in no checkpoint"):
        InitialWeights(model=path).apply(deep)
    report = InitialWeights(model=path, may_stay_new=[r"blocks\.2\."]).apply(deep)
    assert len(report.new) == 24

    biased = ours(init_logit_bias=-10.0)
    with pytest.raises(ValueError, match="logit_bias: in no checkpoint"):
        InitialWeights(model=path).apply(biased)

    torch.manual_seed(0)
    wide = CLIP(image=ours().image, text=ours().text, embed_dim=24)
    with pytest.raises(ValueError, match=r"image_projection.weight is \(20, 32\), here \(24, 32\)"):
        InitialWeights(model=path).apply(wide)


def test_files_that_are_no_checkpoint_say_so(tmp_path):
    with pytest.raises(ValueError, match="give model, image or text"):
        InitialWeights()
    with pytest.raises(ValueError, match="is missing"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds none of open_clip_model"):
        load_weights(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="no readable|not a readable file"):
        load_weights(tmp_path / "text.pt")
    torch.save({"resnet.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"holds no CLIP in the layout.*resnet\.weight"):
        InitialWeights(model=str(tmp_path / "other.pt")).apply(ours())


class Payload:
    """What a pickle would do when it is read."""

    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"state_dict": {"image.patch_embed.weight": Payload()}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a readable file"):
        load_weights(tmp_path / "x.pt")
    assert capsys.readouterr().out == ""
