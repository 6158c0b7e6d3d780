"""LAMB against the paper's algorithm 2, a parameter at a time, in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor

from pipeline.optim.lamb import Lamb
from tests.optim.small_model import give_gradients, tiny

BETAS, EPS = (0.9, 0.98), 1e-6


def reference(
    w: Tensor, gradients: list[Tensor], lr: float, decay: float, adapts: bool, bounds: tuple
) -> Tensor:
    """One parameter; norms by hand."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step, g in enumerate(gradients, start=1):
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        u = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS) + decay * w
        ratio = 1.0
        size, length = math.sqrt(w.pow(2).sum()), math.sqrt(u.pow(2).sum())
        if adapts and size > 0 and length > 0:
            ratio = min(max(size / length, bounds[0]), bounds[1])
        w = w - lr * ratio * u
    return w


@pytest.mark.parametrize("bounds", [(0.01, 10.0), (0.3, 0.5), (1e-9, 1e9)])
@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_equals_the_formula(bounds: tuple[float, float], decay: float) -> None:
    torch.manual_seed(0)
    model = tiny().double()
    with torch.no_grad():
        model.image_projection.weight.zero_()  # a norm of 0: ratio 1
        model.text.position.mul_(1000)  # a ratio at the upper bound
    before = copy.deepcopy(model)
    lamb = Lamb(
        lr=0.01,
        weight_decay=decay,
        min_coeff=bounds[0],
        max_coeff=bounds[1],
        towers={"text": {"lr": 0.002}},
        no_decay=["image.position"],
    )
    optimizer = lamb.make(model)
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for step in range(4):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    for name, parameter in before.named_parameters():
        adapts = parameter.ndim > 1 and name != "image.position"
        lr = 0.002 if name.startswith("text") else 0.01
        rate = decay if adapts else 0.0
        expected = reference(parameter.detach(), gradients[name], lr, rate, adapts, bounds)
        found = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14, msg=name)


def test_a_saved_optimizer_continues_bit_identically(tmp_path) -> None:
    torch.manual_seed(0)
    model = tiny()
    optimizer = Lamb(lr=0.01).make(model)
    for step in range(6):
        if step == 3:
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
        give_gradients(model, step)
        optimizer.step()
    again = tiny()
    other = Lamb(lr=0.01).make(again)
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    for step in range(3, 6):
        give_gradients(again, step)
        other.step()
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_parameters_without_a_gradient_stay() -> None:
    model = tiny()
    optimizer = Lamb(lr=0.01).make(model)
    give_gradients(model, 0)
    model.image.position.grad = None
    before = model.image.position.detach().clone()
    optimizer.step()
    assert torch.equal(model.image.position, before)


def test_bounds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_coeff=2, max_coeff=1"):
        Lamb(lr=0.1, min_coeff=2, max_coeff=1)


def test_flat_pieces_are_refused() -> None:
    """What ZeRO does to a group: one flat tensor instead of its parameters."""
    optimizer = Lamb(lr=0.1).make(tiny())
    group = optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(torch.cat([p.detach().ravel() for p in group["params"]]))]
    group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(ValueError, match="LAMB needs whole parameters"):
        optimizer.step()
