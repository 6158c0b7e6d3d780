import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.optim.adamw import AdamW
from pipeline.optim.groups import Rates, block_of, check_whole, describe, layer_of
from pipeline.optim.lamb import Lamb
from pipeline.optim.muon import Muon
from tests.optim.small_model import tiny

PARITY = Path(__file__).parents[1] / "data" / "parity" / "schedules.json"


def test_every_parameter_is_in_one_group_by_its_dimensions() -> None:
    model = tiny()
    decayed, exempt = Rates(lr=0.1, weight_decay=0.2).groups(model)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.2, 0.0)
    assert decayed["base_lr"] == exempt["base_lr"] == 0.1
    assert sorted(decayed["names"] + exempt["names"]) == sorted(dict(model.named_parameters()))
    assert all(name.endswith(("weight", "position")) for name in decayed["names"])
    for name in ("log_logit_scale", "image.class_token", "image.ln_pre.weight"):
        assert name in exempt["names"]
    named = dict(model.named_parameters())
    for group in (decayed, exempt):
        assert all(named[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.image.requires_grad_(False)
    rates = Rates(lr=0.1, weight_decay=0.2, towers={"image": {"lr": 0.5, "layer_decay": 0.5}})
    groups = rates.groups(model)
    names = [name for group in groups for name in group["names"]]
    assert any(name.startswith("text.") for name in names)
    assert not any(name.startswith("image.") for name in names)
    assert {group["lr"] for group in groups if group["tower"] == "image"} == {0.5}  # projection


def test_only_decayed_parameters_shrink() -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = Rates(lr=0.1, weight_decay=0.5, no_decay=["*.position"]).groups(model)
    optimizer = torch.optim.AdamW(groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert "text.position" not in groups[0]["names"]
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in groups[0]["names"] else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("holder", ["model", None])
def test_rates_by_tower_and_depth(holder: str | None) -> None:
    model = tiny(layers=2)
    towers = {
        "image": {"lr": 0.8, "weight_decay": 0.3, "layer_decay": 0.5},
        "text": {"lr": 0.02},
    }
    held = model if holder is None else nn.ModuleDict({holder: model})
    groups = Rates(lr=0.1, weight_decay=0.2, towers=towers).groups(held)
    found = {
        name.removeprefix("model."): (group["base_lr"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    assert len(found) == len(list(model.named_parameters()))
    for name, expected in {
        "image.patch_embed.weight": (0.1, 0.3),
        "image.class_token": (0.1, 0),
        "image.position": (0.1, 0.3),
        "image.ln_pre.weight": (0.1, 0),
        "image.transformer.blocks.0.attention.qkv.weight": (0.2, 0.3),
        "image.transformer.blocks.1.norm_1.bias": (0.4, 0),
        "image.ln_post.weight": (0.8, 0),
        "image_projection.weight": (0.8, 0.3),
        "text.token_embed.weight": (0.02, 0.2),
        "text.transformer.blocks.0.mlp.up.weight": (0.02, 0.2),
        "text_projection.weight": (0.02, 0.2),
        "log_logit_scale": (0.1, 0),
    }.items():
        assert found[name] == pytest.approx(expected), name
    assert [g["lr"] for g in groups] == sorted((g["lr"] for g in groups), reverse=True)


@pytest.mark.parametrize("name", json.loads(PARITY.read_text())["eva_layer_decay"])
def test_layer_of_equals_evas(name: str) -> None:
    case = json.loads(PARITY.read_text())["eva_layer_decay"][name]
    layers = {n: layer for n, layer in case["layer_id"].items() if layer is not None}
    assert set(layers.values()) == set(range(case["num_layers"] + 2))
    for parameter, expected in layers.items():
        assert layer_of(parameter, num_blocks=case["num_layers"]) == expected, parameter


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("text.transformer.resblocks.11.ln_1.weight", 11),
        ("text.encoder.layer.3.attention.self.query.weight", 3),
        ("text.encoder.layers.4.mlp.fc1.weight", 4),
        ("text.encoder.block.5.layer.0.SelfAttention.q.weight", 5),
        ("text.h.6.attn.c_attn.weight", 6),
        ("image.transformer.blocks.7.mlp.up.weight", 7),
        ("image.ln_post.weight", None),
        ("image.layer1.0.conv2.weight", None),
    ],
)
def test_blocks_are_found_in_the_names_of_many_towers(name: str, block: int | None) -> None:
    assert block_of(name) == block


def test_what_fits_no_parameter_is_named() -> None:
    def groups(model: nn.Module, **options: object) -> list:
        return Rates(lr=0.1, weight_decay=0.2, **options).groups(model)

    with pytest.raises(ValueError, match=r"towers.visual: no parameter .* has image, image_proj"):
        groups(tiny(), towers={"visual": {"lr": 1.0}})
    with pytest.raises(ValueError, match=r"no_decay: 'pos_embed' fits no parameter"):
        groups(tiny(), no_decay=["pos_embed"])
    model = nn.ModuleDict({"image": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"towers.image.layer_decay: .* no numbered blocks"):
        groups(model, towers={"image": {"layer_decay": 0.5}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0}, "lr=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"towers": {"image": {"learning_rate": 1}}}, "towers.image.learning_rate: .*layer_decay"),
        ({"towers": {"image": {"layer_decay": 1.5}}}, "towers.image.layer_decay=1.5"),
        ({"towers": {"image": {"layer_decay": 0}}}, "towers.image.layer_decay=0"),
    ],
)
def test_rates_that_make_no_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Rates(**{"lr": 0.1, "weight_decay": 0.2, **options})


def test_the_table_tells_every_group() -> None:
    model = tiny(layers=3)
    rows = describe(Rates(lr=0.1, weight_decay=0.2).groups(model))
    assert [row["weight decay"] for row in rows] == ["0.2", "0"]
    counts = [int(row["parameters"].replace(",", "")) for row in rows]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())
    assert rows[0]["names"].count("image.transformer.blocks.*.attention.qkv.weight") == 1
    towers = {"image": {"layer_decay": 0.5}}
    deep = describe(Rates(lr=0.1, weight_decay=0.2, towers=towers).groups(model))
    first_block = next(row for row in deep if "image.transformer.blocks.0" in row["names"])
    assert first_block["lr"] == "0.0125" and "blocks.*" not in first_block["names"]
    assert "log_logit_scale" in rows[1]["names"] and "log_logit_scale" not in rows[0]["names"]


def test_flat_pieces_of_parameters_are_refused() -> None:
    groups = Rates(lr=0.1, weight_decay=0.2).groups(tiny())
    check_whole(groups, "LAMB")
    flat = [{**groups[0], "params": [torch.cat([p.flatten() for p in groups[0]["params"]])]}]
    with pytest.raises(ValueError, match="LAMB needs whole parameters"):
        check_whole(flat, "LAMB")
    alone = [{"params": [torch.zeros(6)], "names": ["image_projection.weight"], "decayed": True}]
    with pytest.raises(ValueError, match="flat pieces"):
        check_whole(alone, "LAMB")


@pytest.mark.parametrize("make", [AdamW, Lamb, Muon])
@pytest.mark.parametrize(
    "words", [{"betas": b} for b in ([0.9, 1.0], [-0.1, 0.9], [0.9], [0.9] * 3)] + [{"eps": 0.0}]
)
def test_moments_that_end_in_nan_are_refused(make: type, words: dict) -> None:
    with pytest.raises(ValueError, match=r"two betas in \[0, 1\), and eps above 0"):
        make(lr=0.1, **words)
    make(lr=0.1, betas=[0.0, 0.95], eps=1e-8)
