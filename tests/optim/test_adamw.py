import pytest
import torch

from pipeline.optim.adamw import AdamW
from tests.optim.small_model import give_gradients, gradients, tiny


def trained(fused: bool, steps: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = tiny()
    optimizer = AdamW(lr=1e-2, towers={"text": {"lr": 1e-3}}, fused=fused).make(model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (step + 1) / steps
        give_gradients(model, step)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_equals_the_formula() -> None:
    """Loshchilov and Hutter's algorithm 2 in float64, on one matrix and one gain."""
    steps, ours = 5, trained(fused=True)
    torch.manual_seed(0)
    model = tiny()
    for name, lr, decay in (
        ("image.transformer.blocks.0.mlp.up.weight", 1e-2, 0.2),
        ("text.ln_final.weight", 1e-3, 0.0),
    ):
        w = dict(model.named_parameters())[name].detach().double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for step in range(steps):
            g, rate = gradients(model, step)[name].double(), lr * (step + 1) / steps
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            direction = m / (1 - 0.9 ** (step + 1))
            direction /= (v / (1 - 0.98 ** (step + 1))).sqrt() + 1e-6
            w = w * (1 - rate * decay) - rate * direction
        torch.testing.assert_close(ours[name].double(), w, rtol=2e-5, atol=2e-6)


def test_fused_is_the_same_step() -> None:
    fused, loop = trained(fused=True), trained(fused=False)
    for name in fused:
        torch.testing.assert_close(fused[name], loop[name], rtol=1e-5, atol=1e-6)


def test_rates_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="lr=-1"):
        AdamW(lr=-1)
