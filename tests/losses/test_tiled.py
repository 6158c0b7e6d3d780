"""The tiled losses against the dense ones and against the formulas, on one process.

Letters: B pairs, D embedding width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distributed import Peers
from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss

PAIRS = {
    "softmax": (SoftmaxLoss, TiledSoftmaxLoss),
    "smoothed": (
        lambda: SoftmaxLoss(label_smoothing=0.1),
        lambda **options: TiledSoftmaxLoss(label_smoothing=0.1, **options),
    ),
    "sigmoid": (SigmoidLoss, TiledSigmoidLoss),
}
both = pytest.mark.parametrize(("dense", "tiled"), PAIRS.values(), ids=PAIRS)
Make = Callable[..., nn.Module]


def leaves(
    pairs: int, width: int, scale: float, dtype: torch.dtype = torch.float64, bias: float = -10.0
) -> list[Tensor]:
    """Unit-norm images and texts, half of them alike, the log of the scale, the bias."""
    generator = torch.Generator().manual_seed(pairs)
    image = torch.randn(pairs, width, generator=generator, dtype=torch.float64)
    text = image * (torch.arange(pairs) % 2)[:, None]
    text = text + torch.randn(pairs, width, generator=generator, dtype=torch.float64)
    values = [F.normalize(image, dim=-1), F.normalize(text, dim=-1)]
    values += [torch.tensor(scale).double().log(), torch.tensor(bias).double()]
    return [value.to(dtype).requires_grad_() for value in values]


def evaluate(loss: nn.Module, inputs: list[Tensor], **peers: Peers) -> Tensor:
    image, text, log_scale, bias = inputs
    return loss(
        PairFeatures(
            image_embed=image,
            text_embed=text,
            logit_scale=log_scale.exp(),
            logit_bias=bias,
            **peers,
        )
    )


def loss_and_gradients(loss: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    value = evaluate(loss, inputs)
    gradients = torch.autograd.grad(value, inputs, materialize_grads=True)
    return [value.detach(), *gradients]


def largest_difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    """Absolute, relative above 1."""
    return max(
        ((a - b).abs() / b.abs().clamp(min=1)).max().item()
        for a, b in zip(ours, expected, strict=True)
    )


@both
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("pairs", "width", "tile"), [(23, 7, 5), (16, 33, 8), (1, 3, 4)])
def test_equals_dense(
    dense: Make, tiled: Make, pairs: int, width: int, tile: int, scale: float
) -> None:
    """Any number of pairs, any width, tiles that do not divide the pairs."""
    inputs = leaves(pairs, width, scale)
    expected = loss_and_gradients(dense(), inputs)
    assert largest_difference(loss_and_gradients(tiled(tile=tile), inputs), expected) <= 1e-12


def formula(name: str, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """The losses pair by pair, from the definitions."""
    logits = log_scale.exp() * image @ text.T
    total = torch.zeros((), dtype=logits.dtype)
    for i in range(len(logits)):
        if name == "softmax":
            for line in (logits[i], logits[:, i]):
                total = total - torch.log(torch.exp(line[i]) / torch.exp(line).sum()) / 2
        else:
            for j in range(len(logits)):
                sign = 1 if i == j else -1
                total = total + torch.log(1 + torch.exp(-sign * (logits[i, j] + bias)))
    return total / len(logits)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_equals_the_definition(name: str) -> None:
    inputs = leaves(9, 4, 5.0)
    value = formula(name, *inputs)
    gradients = torch.autograd.grad(value, inputs, materialize_grads=True)
    ours = loss_and_gradients(PAIRS[name][1](tile=4), inputs)
    assert largest_difference(ours, [value.detach(), *gradients]) <= 1e-12


@both
def test_float32_and_the_narrow_types(dense: Make, tiled: Make) -> None:
    """bfloat16 embeddings give the loss of their values, computed in float32 also under autocast,
    and gradients in bfloat16.
    """
    narrow = [x.detach().bfloat16().requires_grad_() for x in leaves(40, 16, 50.0)[:2]]
    scalars = leaves(40, 16, 50.0, torch.float32)[2:]
    wide = [x.detach().double().requires_grad_() for x in (*narrow, *scalars)]
    expected = loss_and_gradients(dense(), wide)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(tiled(tile=16), [*narrow, *scalars])
    assert [x.dtype for x in ours] == [torch.float32, *[torch.bfloat16] * 2, *[torch.float32] * 2]
    assert largest_difference(ours[1:3], expected[1:3]) <= 2**-8
    assert largest_difference(ours[:1] + ours[3:], expected[:1] + expected[3:]) <= 2e-5


@both
def test_scale_100_is_finite_in_float32(dense: Make, tiled: Make) -> None:
    """exp(100) is not: the negative control is a sum of unshifted exponentials."""
    inputs = leaves(40, 3, 100.0, torch.float32)
    logits = 100 * inputs[0] @ inputs[0].T
    assert logits.exp().sum(1).isinf().any()
    ours = loss_and_gradients(tiled(tile=16), [inputs[0], inputs[0], *inputs[2:]])
    assert all(x.isfinite().all() for x in ours)
    # opposite embeddings: every logit is -100
    far = [torch.ones(4, 1), -torch.ones(4, 1), inputs[2], inputs[3]]
    expected = evaluate(dense(), far).item()
    assert evaluate(tiled(tile=3), far).item() == pytest.approx(expected, abs=2e-5)


def saved_bytes(loss: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward, each storage once."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        evaluate(loss, inputs)
    return sum(kept.values())


@both
def test_keeps_a_fiftieth_of_the_dense_bytes(dense: Make, tiled: Make) -> None:
    """B = 32,768, D = 512, float32, on the meta device: shapes without values."""
    shapes = [(32_768, 512)] * 2 + [()] * 2
    inputs = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    ours, theirs = (saved_bytes(x, inputs) for x in (tiled(tile=8192), dense()))
    features = 2 * 32_768 * 512 * 4
    assert features <= ours <= 1.01 * features
    assert ours <= theirs / 50


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        counts = [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
        self.elements = max(self.elements, *counts, 0)
        return result


@both
def test_holds_features_and_one_tile(dense: Make, tiled: Make) -> None:
    inputs = leaves(256, 8, 14.0)
    with Largest() as largest:
        loss_and_gradients(tiled(tile=32), inputs)
    assert largest.elements == 256 * 8
    with Largest() as largest:
        loss_and_gradients(dense(), inputs)
    assert largest.elements == 256 * 256


class Truncated(TorchDispatchMode):
    """Matrix products whose operands have TensorFloat-32's 10 bits, as some GPUs cut them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            *added, left, right = args
            cut = [
                (x.contiguous().view(torch.int32) & ~0x1FFF).view(x.dtype) for x in (left, right)
            ]
            args = (*added, *cut)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("alike", "scale"), [(0.2, 50.0), (0.3, 100.0), (0.9, 100.0)])
def test_rounded_products_cancel_as_in_the_dense_loss(alike: float, scale: float) -> None:
    """A pair's own logit is rounded as those it is compared with: else a loss may be negative."""
    generator = torch.Generator().manual_seed(0)
    common, *own = (
        F.normalize(torch.randn(256, 64, generator=generator), dim=-1) for _ in range(3)
    )
    rows = [F.normalize(alike**0.5 * common + (1 - alike) ** 0.5 * x, dim=-1) for x in own]
    scalars = [torch.tensor(scale).log(), torch.tensor(-10.0)]
    inputs = [x.requires_grad_() for x in (*rows, *scalars)]
    exact = loss_and_gradients(SoftmaxLoss(), inputs)
    with Truncated():
        theirs = loss_and_gradients(SoftmaxLoss(), inputs)
        ours = loss_and_gradients(TiledSoftmaxLoss(tile=100), inputs)
    for mine, dense, value in zip(ours, theirs, exact, strict=True):
        assert (mine - value).norm() <= 2 * (dense - value).norm() + 1e-4 * value.norm() + 1e-5


@both
def test_works_without_gradients_and_for_frozen_inputs(dense: Make, tiled: Make) -> None:
    inputs = leaves(10, 6, 14.0)
    expected = loss_and_gradients(dense(), inputs)
    with torch.no_grad():
        assert evaluate(tiled(tile=4), inputs).item() == pytest.approx(expected[0].item())
    frozen = [x.detach() for x in inputs]
    for position in range(3):
        some = [*frozen[:position], inputs[position], *frozen[position + 1 :]]
        [gradient] = torch.autograd.grad(evaluate(tiled(tile=4), some), [inputs[position]])
        assert largest_difference([gradient], [expected[1 + position]]) <= 1e-12


@both
def test_strided_embeddings(dense: Make, tiled: Make) -> None:
    inputs = leaves(10, 6, 14.0)
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in inputs[:2]]
    ours = loss_and_gradients(tiled(tile=4), [*strided, *inputs[2:]])
    assert largest_difference(ours, loss_and_gradients(dense(), inputs)) <= 1e-12


@pytest.mark.parametrize("make", [TiledSoftmaxLoss, TiledSigmoidLoss])
def test_mistakes_are_named(make: Make) -> None:
    with pytest.raises(ValueError, match="tile 0 is below 1"):
        make(tile=0)
    with pytest.raises(ValueError, match="'cuda' is unknown.*'triton'"):
        make(backend="cuda")
    with pytest.raises(ValueError, match="backend triton needs .*float64"):
        evaluate(make(backend="triton"), leaves(3, 2, 5.0))
    with pytest.raises(ValueError, match="label_smoothing 1.0"):
        TiledSoftmaxLoss(label_smoothing=1.0)
