"""Optimizer state finds its parameters by name where a new phase begins."""

import pytest
import torch
from torch import nn

from pipeline.optim.adafactor import Adafactor
from pipeline.optim.adamw import AdamW
from pipeline.optim.lamb import Lamb
from pipeline.optim.muon import Muon
from pipeline.trainer.phases import carried_state


def optimizer_of(model, steps, make=AdamW):
    optimizer = make(lr=0.1).make(model)
    for step in range(steps):
        optimizer.zero_grad()
        (model(torch.full((2, 3), step + 1.0)) ** 2).mean().backward()
        optimizer.step()
    return optimizer


def model_of(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3))


class Blocks(nn.Sequential):
    """The same within a tower's blocks, where Muon looks for matrices."""

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield f"image.blocks.{name}", parameter


def by_name(optimizer):
    return {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def test_moments_follow_names_when_parameters_come_and_go():
    first = model_of()
    first[1].weight.requires_grad_(False)
    before = optimizer_of(first, steps=3)
    second = model_of()
    second[0].bias.requires_grad_(False)
    after = AdamW(lr=0.5).make(second)
    after.load_state_dict(carried_state(before.state_dict(), after))
    old, new = by_name(before), by_name(after)
    assert set(old) == {"0.weight", "0.bias", "1.bias"} and set(new) == {"0.weight", "1.bias"}
    for name, state in new.items():
        assert torch.equal(state["exp_avg"], old[name]["exp_avg"]) and state["step"] == 3
    assert {group["lr"] for group in after.param_groups} == {0.5}


def test_another_shape_starts_without_moments():
    before, wider = optimizer_of(model_of(), steps=2), model_of(width=5)
    after = AdamW(lr=0.1).make(wider)
    after.load_state_dict(carried_state(before.state_dict(), after))
    assert set(by_name(after)) == {"1.bias"}
    (wider(torch.ones(2, 3)) ** 2).mean().backward()
    after.step()
    assert set(by_name(after)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("make", [AdamW, Lamb, Adafactor, Muon])
def test_every_optimizer_keeps_its_state(make):
    models = Blocks(*model_of()), Blocks(*model_of())
    before, after = optimizer_of(models[0], 2, make), make(lr=0.1).make(models[1])
    after.load_state_dict(carried_state(before.state_dict(), after))
    old, new = by_name(before), by_name(after)
    assert len(old) == 4 and set(new) == set(old)
    for name, state in old.items():
        assert state.keys() == new[name].keys()
        assert all(torch.equal(value, new[name][key]) for key, value in state.items()), name


def test_a_longer_table_starts_without_rows_and_columns():
    before = optimizer_of(model_of(), steps=2, make=Adafactor)
    after = Adafactor(lr=0.1).make(model_of(width=5))
    after.load_state_dict(carried_state(before.state_dict(), after))
    assert set(by_name(after)) == {"1.bias"}


def test_a_state_of_no_shape_is_left_behind():
    before = optimizer_of(model_of(), steps=2)
    state = before.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(7, 7)
    after = AdamW(lr=0.1).make(model_of())
    after.load_state_dict(carried_state(state, after))
    assert len(by_name(after)) == 3
