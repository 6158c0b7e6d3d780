"""The fused tiles against torch's.

On a GPU (`make test-gpu`) they are compiled. Without one, in an environment that has Triton, pytest
interprets them on the CPU if TRITON_INTERPRET=1.
Letters: R x C the tile, D embedding width.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses import torch_tiles
from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_TRITON or not (INTERPRETED or DEVICE == "cuda"),
        reason="needs Triton and a CUDA device, or TRITON_INTERPRET=1",
    ),
]
if HAS_TRITON:
    from pipeline.losses import triton_tiles

# Several programs each way, none full; a width that is no multiple of the step; less than a block.
SIZES = [(130, 200, 33), (64, 64, 32), (150, 150, 80), (5, 3, 7)]
SCALES = [1.0, 14.0, 100.0]


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def tile(num_rows: int, num_columns: int, width: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    rows, columns = (
        F.normalize(torch.randn(count, width, generator=generator), dim=-1)
        for count in (num_rows, num_columns)
    )
    return (scale * rows).to(DEVICE), columns.to(DEVICE)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_softmax_tiles(size: tuple[int, int, int], scale: float) -> None:
    rows, columns = tile(*size, scale)
    *expected, _ = torch_tiles.log_sum_exps(rows, columns, own=False)
    *ours, diagonal = triton_tiles.log_sum_exps(rows, columns, own=False)
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)
    assert diagonal is None
    square = rows, torch.cat([columns, rows])[: len(rows)]
    for mine, theirs in zip(
        triton_tiles.log_sum_exps(*square, own=True),
        torch_tiles.log_sum_exps(*square, own=True),
        strict=True,
    ):
        close(mine, theirs)
    factors = [torch.linspace(-1, 2, count, device=DEVICE) for count in size[:2]]
    given = (rows, columns, *expected, *factors)
    close(triton_tiles.softmax_weights(*given), torch_tiles.softmax_weights(*given), 5e-5)


@pytest.mark.parametrize("loss", [TiledSoftmaxLoss, TiledSigmoidLoss])
def test_with_tensor_float_32(loss: type) -> None:
    """The blocks and the instructions of the fast products; 10 bits of each factor."""
    image, text = tile(300, 300, 64, 1.0)
    scale, bias = (torch.tensor(value, device=DEVICE) for value in (14.0, -10.0))
    inputs = [x.requires_grad_() for x in (image, text, scale, bias)]
    names = ("image_embed", "text_embed", "logit_scale", "logit_bias")
    results = []
    for precision, backend in (("highest", "torch"), ("high", "triton")):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            value = loss(tile=260, backend=backend)(
                PairFeatures(**dict(zip(names, inputs, strict=True)))
            )
            gradients = torch.autograd.grad(value, inputs, materialize_grads=True)
        finally:
            torch.set_float32_matmul_precision(before)
        results.append([value.detach(), *gradients])
    for ours, expected in zip(*reversed(results), strict=True):
        assert (ours - expected).norm() <= 5e-3 * expected.norm() + 1e-6


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sigmoid_tiles(size: tuple[int, int, int], scale: float, own: bool) -> None:
    rows, columns = tile(*size, scale)
    if own and len(rows) != len(columns):
        columns = tile(len(rows), len(rows), size[2], 1.0)[1]
    for bias in (-10.0, -18.0):
        given = (rows, columns, torch.tensor(bias, device=DEVICE))
        ours = triton_tiles.sigmoid_losses(*given, own=own)
        # Relative: at -18 a loss is exp(-18), which 1 + exp(-18) does not hold in float32.
        torch.testing.assert_close(
            ours, torch_tiles.sigmoid_losses(*given, own=own), atol=0, rtol=5e-5
        )
        weights = triton_tiles.sigmoid_weights(*given, own=own)
        torch.testing.assert_close(
            weights, torch_tiles.sigmoid_weights(*given, own=own), atol=1e-7, rtol=5e-5
        )


@pytest.mark.parametrize(
    ("dense", "tiled"),
    [(SoftmaxLoss(), TiledSoftmaxLoss), (SigmoidLoss(), TiledSigmoidLoss)],
    ids=["softmax", "sigmoid"],
)
def test_loss_and_gradients(dense: nn.Module, tiled: type) -> None:
    image, text = tile(150, 150, 40, 1.0)
    scale, bias = (torch.tensor(value, device=DEVICE) for value in (14.0, -10.0))
    inputs = [x.requires_grad_() for x in (image, text, scale, bias)]
    results = []
    for loss in (dense, tiled(tile=70, backend="triton")):
        features = dict(
            zip(("image_embed", "text_embed", "logit_scale", "logit_bias"), inputs, strict=True)
        )
        value = loss(PairFeatures(**features))
        gradients = torch.autograd.grad(value, inputs, materialize_grads=True)
        results.append([value.detach(), *gradients])
    for ours, expected in zip(*reversed(results), strict=True):
        close(ours, expected)
