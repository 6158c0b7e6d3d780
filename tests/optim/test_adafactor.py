import pytest
import torch

from pipeline.optim.adafactor import Adafactor
from tests.optim.small_model import give_gradients, tiny


def test_equals_the_formula_at_the_first_step() -> None:
    """Algorithm 4 at t = 1, where the decay is 0: the row and column means of g squared."""
    torch.manual_seed(0)
    model = tiny().double()
    weight = model.image_projection.weight
    w = weight.detach().clone()
    optimizer = Adafactor(lr=0.01, weight_decay=0.1).make(model)
    give_gradients(model, 0)
    optimizer.step()
    squares = weight.grad**2
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    u = weight.grad / (rows * columns / rows.mean()).sqrt()
    u /= max(1.0, u.square().mean().sqrt().item())
    size = max(1e-3, w.square().mean().sqrt().item())
    torch.testing.assert_close(weight.detach(), w * (1 - 0.01 * 0.1) - 0.01 * size * u)


def test_state_of_a_matrix_is_a_row_and_a_column() -> None:
    model = tiny()
    optimizer = Adafactor(lr=0.01).make(model)
    give_gradients(model, 0)
    optimizer.step()
    state = optimizer.state[model.text_projection.weight]
    assert sum(value.numel() for value in state.values()) == 1 + 12 + 16


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="beta2_decay=0.8 must not be positive"):
        Adafactor(lr=0.1, beta2_decay=0.8)
