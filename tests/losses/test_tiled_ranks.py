"""The tiled losses on several processes against the dense formula over all pairs on one.

Letters: B pairs of a rank, D embedding width.
"""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import Peers, peers
from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss

LOCAL, WIDTH, TILE = 5, 7, 2
SCALES = (10.0, 100.0)
WORLDS = (2, 4)
LOSSES = {
    "softmax": (SoftmaxLoss(), TiledSoftmaxLoss(tile=TILE)),
    "smoothed": (
        SoftmaxLoss(label_smoothing=0.2),
        TiledSoftmaxLoss(label_smoothing=0.2, tile=TILE),
    ),
    "sigmoid": (SigmoidLoss(), TiledSigmoidLoss(tile=TILE)),
}


def leaves(ranks: range, scale: float) -> list[Tensor]:
    """Image and text of these ranks, the log of the scale, the bias."""
    image, text = (
        torch.cat(
            [
                torch.randn(
                    LOCAL,
                    WIDTH,
                    generator=torch.Generator().manual_seed(10 * rank + side),
                    dtype=torch.float64,
                )
                for rank in ranks
            ]
        )
        for side in (0, 1)
    )
    values = [F.normalize(image, dim=-1), F.normalize(image + text, dim=-1)]
    values += [torch.tensor(scale).double().log(), torch.tensor(-8.0).double()]
    return [value.requires_grad_() for value in values]


def loss_and_gradients(loss: nn.Module, inputs: list[Tensor], among: Peers) -> list[Tensor]:
    image, text, log_scale, bias = inputs
    value = loss(
        PairFeatures(
            image_embed=image,
            text_embed=text,
            logit_scale=log_scale.exp(),
            logit_bias=bias,
            peers=among,
        )
    )
    return [value.detach(), *torch.autograd.grad(value, inputs, materialize_grads=True)]


def evaluate_in_a_group(index: int, world: int, directory: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init-{world}", rank=index, world_size=world
    )
    results = {
        (name, scale): [
            loss_and_gradients(loss, leaves(range(index, index + 1), scale), peers())
            for loss in losses
        ]
        for name, losses in LOSSES.items()
        for scale in SCALES
    }
    torch.save(results, directory / f"{world}-{index}.pt")
    dist.destroy_process_group()


def run_rank(index: int, directory: str) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if index < world:
            evaluate_in_a_group(index, world, Path(directory))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all ranks: the groups follow each other in the same processes."""
    directory = tmp_path_factory.mktemp("tiled")
    # One process imports torch and the ranks are its forks: four imports cost ten seconds.
    multiprocessing.set_forkserver_preload(["torch.distributed", __name__])
    mp.start_processes(
        run_rank, args=(os.fspath(directory),), nprocs=max(WORLDS), start_method="forkserver"
    )
    return directory


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_together_equal_one(world: int, name: str, scale: float, directory: Path) -> None:
    """Loss and gradients after averaging over ranks: an embedding's is on one rank alone."""
    dense, _ = LOSSES[name]
    expected = loss_and_gradients(dense, leaves(range(world), scale), Peers())
    results = [torch.load(directory / f"{world}-{rank}.pt")[name, scale] for rank in range(world)]
    for of_ranks in zip(*results, strict=True):
        loss, image, text, *scalars = zip(*of_ranks, strict=True)
        assert len({value.item() for value in loss}) == world
        averaged = [
            torch.stack(loss).mean(),
            torch.cat(image) / world,
            torch.cat(text) / world,
            *(torch.stack(scalar).mean() for scalar in scalars),
        ]
        for value, wanted in zip(averaged, expected, strict=True):
            torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_without_peers_the_loss_is_another(name: str) -> None:
    """The negative control: each rank among its own pairs alone, as if no block had arrived."""
    dense, tiled = LOSSES[name]
    expected = loss_and_gradients(dense, leaves(range(2), 10.0), Peers())
    alone = [
        loss_and_gradients(tiled, leaves(range(rank, rank + 1), 10.0), Peers()) for rank in (0, 1)
    ]
    loss, image, *_ = zip(*alone, strict=True)
    assert (torch.stack(loss).mean() - expected[0]).abs() > 0.01
    assert (torch.cat(image) / 2 - expected[1]).abs().max() > 0.01
