"""Muon with AdamW against the two torch optimizers, each on its own parameters."""

import copy

import pytest
import torch
from torch import Tensor

from pipeline.optim.muon import Muon
from tests.optim.small_model import give_gradients, tiny

TOWERS = {"text": {"lr": 0.002, "weight_decay": 0.1}}


def test_every_parameter_steps_by_its_own_optimizer() -> None:
    torch.manual_seed(0)
    model = tiny(layers=2)
    reference = copy.deepcopy(model)
    optimizer = Muon(lr=0.01, towers=TOWERS).make(model)
    references = []
    for name, parameter in reference.named_parameters():
        lr, decay = (0.002, 0.1) if name.startswith("text") else (0.01, 0.2)
        if ".blocks." in name and parameter.ndim == 2:
            options = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
            one = torch.optim.Muon([parameter], lr=lr, weight_decay=decay, **options)
        else:
            decay = decay if parameter.ndim > 1 else 0.0
            options = {"betas": (0.9, 0.98), "eps": 1e-6}
            one = torch.optim.AdamW([parameter], lr=lr, weight_decay=decay, **options)
        references.append(one)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(reference, step)
        optimizer.step()
        for one in references:
            one.step()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_the_update_is_orthogonal_and_as_long_as_adamws() -> None:
    """Singular values near 1 before the scale (the iteration's own spread), by torch's SVD."""
    torch.manual_seed(0)
    model = tiny()
    weight = model.image.transformer.blocks[0].mlp.up.weight  # (64, 16)
    before = weight.detach().clone()
    optimizer = Muon(lr=0.01, weight_decay=0.0).make(model)
    give_gradients(model, 0)
    optimizer.step()
    update = (before - weight.detach()) / 0.01
    values = torch.linalg.svdvals(update / (0.2 * 64**0.5))
    assert values.min() > 0.6 and values.max() < 1.3
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_a_schedule_and_a_checkpoint_reach_both(tmp_path) -> None:
    def run(steps: range, saved: tuple | None = None) -> tuple[list[Tensor], torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = tiny()
        optimizer = Muon(lr=0.01, towers=TOWERS).make(model)
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] / (1 + step)
            give_gradients(model, step)
            optimizer.step()
            if step == 2:
                torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
        return list(model.parameters()), optimizer

    whole, optimizer = run(range(5))
    assert {group["lr"] for group in optimizer.param_groups} == {0.002, 0.0004}
    resumed, _ = run(range(3, 5), torch.load(tmp_path / "saved.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert {len(state) for state in optimizer.state.values()} == {1, 3}  # a moment; step and two


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=1"):
        Muon(lr=0.1, momentum=1)
    model = tiny()
    for tower in (model.image, model.text):
        tower.requires_grad_(False)
    with pytest.raises(ValueError, match="no trained parameter is a matrix inside"):
        Muon(lr=0.1).make(model)
    optimizer = Muon(lr=0.1).make(tiny())
    group = optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(torch.zeros(7))]
    with pytest.raises(ValueError, match="Muon needs whole parameters"):
        optimizer.step()
