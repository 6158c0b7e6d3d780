import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.distributed import (
    all_gather_with_grad,
    barrier,
    gather_counts,
    rank,
    world_size,
)

WORLD, LOCAL, WIDTH = 2, 3, 4


def rows_of(index: int) -> torch.Tensor:
    return torch.randn(LOCAL, WIDTH, generator=torch.Generator().manual_seed(index))


def weights_of(index: int) -> torch.Tensor:
    """Each rank's loss is a different function of all rows."""
    shape = (WORLD * LOCAL, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def gather_in_a_group(index: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=index, world_size=WORLD
    )
    rows = rows_of(index).requires_grad_()
    gathered = all_gather_with_grad(rows)
    (gathered.sin() * weights_of(index)).sum().backward()
    # A transposed tensor is not contiguous, and neither is the gradient of a sum.
    strided = rows_of(index).T.contiguous().T.requires_grad_()
    all_gather_with_grad(strided).sum().backward()
    barrier()
    torch.save(
        {
            "rank": rank(),
            "world_size": world_size(),
            "counts": gather_counts(10 + index, rows.device),
            "gathered": gathered.detach(),
            "grad": rows.grad,
            "strided_grad": strided.grad,
        },
        Path(directory) / f"{index}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("gather")
    mp.spawn(gather_in_a_group, args=(os.fspath(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{index}.pt") for index in range(WORLD)]


def test_without_a_group_one_process_is_the_world() -> None:
    rows = rows_of(0)
    barrier()
    assert (rank(), world_size()) == (0, 1)
    assert all_gather_with_grad(rows) is rows
    assert gather_counts(7, rows.device) == [7]


def test_ranks_know_each_other(results: list[dict]) -> None:
    assert [(r["rank"], r["world_size"]) for r in results] == [(0, 2), (1, 2)]
    assert [r["counts"] for r in results] == [[10, 11], [10, 11]]


def test_gather_returns_rows_in_rank_order(results: list[dict]) -> None:
    expected = torch.cat([rows_of(0), rows_of(1)])
    for result in results:
        assert torch.equal(result["gathered"], expected)


def test_gradients_of_all_ranks_are_summed_at_the_owner(results: list[dict]) -> None:
    everything = torch.cat([rows_of(0), rows_of(1)]).requires_grad_()
    (everything.sin() * (weights_of(0) + weights_of(1))).sum().backward()
    for result, expected in zip(results, everything.grad.split(LOCAL), strict=True):
        torch.testing.assert_close(result["grad"], expected)
        assert torch.equal(result["strided_grad"], torch.full((LOCAL, WIDTH), float(WORLD)))
