import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.distributed import peers
from pipeline.losses.features import PairFeatures
from pipeline.losses.softmax import SoftmaxLoss

PARITY = Path(__file__).parents[1] / "data" / "parity"
CASES = json.loads((PARITY / "losses.json").read_text())["clip_infonce"]
WORLD = 2
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def evaluate(image_embed: Tensor, text_embed: Tensor, log_logit_scale: Tensor) -> Tensor:
    return SoftmaxLoss()(
        PairFeatures(
            image_embed=image_embed,
            text_embed=text_embed,
            logit_scale=log_logit_scale.exp(),
            peers=peers(),
        )
    )


def leaves(case: str, dtype: torch.dtype, index: int = 0, world: int = 1) -> list[Tensor]:
    """The rows of rank `index` of `world` as leaves, and the log of the scale."""
    arrays = np.load(PARITY / "losses.npz")
    rows = [torch.from_numpy(arrays[f"clip_infonce/{case}/in/{n}"]) for n in ("image", "text")]
    rows = [r.to(dtype).chunk(world)[index].clone() for r in rows]
    scale = torch.tensor(CASES[case]["scalars"]["log_scale"], dtype=dtype)
    return [leaf.requires_grad_() for leaf in (*rows, scale)]


def expected_gradients(case: str) -> list[Tensor]:
    arrays = np.load(PARITY / "losses.npz")
    rows = [torch.from_numpy(arrays[f"clip_infonce/{case}/grad/{n}"]) for n in ("image", "text")]
    return [*rows, torch.tensor(CASES[case]["grad_scalars"]["log_scale"], dtype=torch.float64)]


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = (value.double() - expected).abs()
    assert (difference <= tolerance * expected.abs().clamp(min=1)).all(), difference.max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_open_clip(case: str, dtype: torch.dtype) -> None:
    inputs = leaves(case, dtype)
    loss = evaluate(*inputs)
    expected = torch.tensor(CASES[case]["loss"], dtype=torch.float64)
    assert_near(loss, expected, TOLERANCE[dtype])
    for gradient, wanted in zip(
        torch.autograd.grad(loss, inputs), expected_gradients(case), strict=True
    ):
        assert_near(gradient, wanted, TOLERANCE[dtype])


def every_case_in_a_group(index: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=index, world_size=WORLD
    )
    results = {}
    for case in CASES:
        inputs = leaves(case, torch.float64, index, WORLD)
        loss = evaluate(*inputs)
        results[case] = (loss.detach(), torch.autograd.grad(loss, inputs))
    torch.save(results, Path(directory) / f"{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("softmax")
    mp.spawn(every_case_in_a_group, args=(os.fspath(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{index}.pt") for index in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, two_ranks: list[dict]) -> None:
    """After averaging over ranks: an embedding's gradient is on one rank and 0 on the other."""
    losses, gradients = zip(*(results[case] for results in two_ranks), strict=True)
    assert losses[0] != losses[1]
    assert torch.stack(losses).mean().item() == pytest.approx(CASES[case]["loss"], abs=1e-12)
    image, text, scale = zip(*gradients, strict=True)
    averaged = [torch.cat(image) / WORLD, torch.cat(text) / WORLD, torch.stack(scale).mean()]
    for gradient, wanted in zip(averaged, expected_gradients(case), strict=True):
        assert_near(gradient, wanted, 1e-12)


def test_large_scale_does_not_overflow() -> None:
    """exp(100) overflows float32: a softmax without subtracting the maximum would be infinite."""
    embed = torch.eye(4)
    loss = evaluate(embed, embed.roll(1, 0), torch.tensor(100.0).log())
    assert loss.item() == pytest.approx(100.0, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_cross_entropy_with_a_soft_target(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=-1
        )
        for _ in range(2)
    )
    features = PairFeatures(
        image_embed=image,
        text_embed=text,
        logit_scale=torch.tensor(9.0, dtype=torch.float64),
    )
    target = torch.eye(7, dtype=torch.float64) * (1 - smoothing) + smoothing / 7
    logits = 9 * image @ text.T
    expected = sum(-(target * z.log_softmax(dim=1)).sum(1).mean() for z in (logits, logits.T)) / 2
    value = SoftmaxLoss(label_smoothing=smoothing)(features)
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_is_named(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing {smoothing}"):
        SoftmaxLoss(label_smoothing=smoothing)
