import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss

PARITY = Path(__file__).parents[1] / "data" / "parity"
CASES = json.loads((PARITY / "losses.json").read_text())["siglip"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
LOSSES = (SigmoidLoss(), TiledSigmoidLoss(tile=5))


def assert_near(value: Tensor, expected: float | np.ndarray, tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (value.double() - expected).abs()
    assert (difference <= tolerance * expected.abs().clamp(min=1)).all(), difference.max()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_open_clip(case: str, dtype: torch.dtype, loss: nn.Module) -> None:
    arrays = np.load(PARITY / "losses.npz")
    scalars, wanted = CASES[case]["scalars"], CASES[case]["grad_scalars"]
    image, text = (
        torch.tensor(arrays[f"siglip/{case}/in/{name}"], dtype=dtype, requires_grad=True)
        for name in ("image", "text")
    )
    log_scale, bias = (
        torch.tensor(scalars[name], dtype=dtype, requires_grad=True)
        for name in ("log_scale", "bias")
    )
    value = loss(
        PairFeatures(
            image_embed=image, text_embed=text, logit_scale=log_scale.exp(), logit_bias=bias
        )
    )
    assert_near(value, CASES[case]["loss"], TOLERANCE[dtype])
    value.backward()
    assert_near(image.grad, arrays[f"siglip/{case}/grad/image"], TOLERANCE[dtype])
    assert_near(text.grad, arrays[f"siglip/{case}/grad/text"], TOLERANCE[dtype])
    assert_near(log_scale.grad, wanted["log_scale"], TOLERANCE[dtype])
    assert_near(bias.grad, wanted["bias"], TOLERANCE[dtype])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_two_pairs_by_hand(loss: nn.Module) -> None:
    """Right pairs at logit 3 - 1 = 2, wrong ones at 0 - 1."""
    rows = torch.eye(2, dtype=torch.float64)
    scalars = {"logit_scale": torch.tensor(3.0).double(), "logit_bias": torch.tensor(-1.0).double()}
    value = loss(PairFeatures(image_embed=rows, text_embed=rows, **scalars))
    assert value.item() == pytest.approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)), abs=1e-15)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_without_a_bias_the_knob_is_named(loss: nn.Module) -> None:
    rows = torch.eye(2)
    with pytest.raises(ValueError, match="init_logit_bias=-10"):
        loss(PairFeatures(image_embed=rows, text_embed=rows, logit_scale=torch.tensor(10.0)))
