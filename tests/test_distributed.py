import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.distributed import (
    Peers,
    all_gather_with_grad,
    barrier,
    gather_counts,
    peers,
    rank,
    world_size,
)

# Three, so that a ring has a direction.
WORLD, LOCAL, WIDTH = 3, 3, 4


def rows_of(index: int) -> torch.Tensor:
    return torch.randn(LOCAL, WIDTH, generator=torch.Generator().manual_seed(index))


def weights_of(index: int) -> torch.Tensor:
    """Each rank's loss is a different function of all rows."""
    shape = (WORLD * LOCAL, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def visits(index: int) -> dict[str, list | torch.Tensor]:
    """What comes around the ring, and what comes home: a number with two digits a visit,
    and a half more for a wrong owner.
    """
    ring = [
        (owner, rows.clone(), number.clone())
        for owner, (rows, number) in peers().ring(rows_of(index), torch.tensor([index]))
    ]
    home = peers().carry(
        (torch.tensor([float(index)]),),
        lambda owner, number: 10 * number + index + 0.5 * (owner != number),
        lambda arrived, own: 100 * arrived + own,
    )
    return {"ring": ring, "home": home}


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
            **visits(index),
        },
        Path(directory) / f"{index}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("gather")
    # One process imports torch and the ranks are its forks.
    multiprocessing.set_forkserver_preload(["torch.distributed", __name__])
    mp.start_processes(
        gather_in_a_group,
        args=(os.fspath(directory),),
        nprocs=WORLD,
        start_method="forkserver",
    )
    return [torch.load(directory / f"{index}.pt") for index in range(WORLD)]


def test_without_a_group_one_process_is_the_world() -> None:
    rows = rows_of(0)
    barrier()
    assert (rank(), world_size()) == (0, 1)
    assert all_gather_with_grad(rows) is rows
    assert gather_counts(7, rows.device) == [7]


def test_ranks_know_each_other(results: list[dict]) -> None:
    assert [(r["rank"], r["world_size"]) for r in results] == [(0, 3), (1, 3), (2, 3)]
    assert [r["counts"] for r in results] == [[10, 11, 12]] * 3


def test_gather_returns_rows_in_rank_order(results: list[dict]) -> None:
    expected = torch.cat([rows_of(index) for index in range(WORLD)])
    for result in results:
        assert torch.equal(result["gathered"], expected)


def test_gradients_of_all_ranks_are_summed_at_the_owner(results: list[dict]) -> None:
    everything = torch.cat([rows_of(index) for index in range(WORLD)]).requires_grad_()
    (everything.sin() * sum(weights_of(index) for index in range(WORLD))).sum().backward()
    for result, expected in zip(results, everything.grad.split(LOCAL), strict=True):
        torch.testing.assert_close(result["grad"], expected)
        assert torch.equal(result["strided_grad"], torch.full((LOCAL, WIDTH), float(WORLD)))


def test_ring_brings_every_block_with_its_owner(results: list[dict]) -> None:
    for index, result in enumerate(results):
        owners = [owner for owner, _, _ in result["ring"]]
        assert owners == [index, (index - 1) % WORLD, (index - 2) % WORLD]
        for owner, rows, number in result["ring"]:
            assert torch.equal(rows, rows_of(owner))
            assert number.tolist() == [owner]


def test_parts_are_merged_in_ring_order_and_come_home(results: list[dict]) -> None:
    """Of each visit two digits: whose block, and who was visited."""
    assert [r["home"].item() for r in results] == [102, 111210, 222021]


def test_alone_a_ring_is_one_visit() -> None:
    rows = rows_of(0)
    assert [(owner, block[0] is rows) for owner, block in Peers().ring(rows)] == [(0, True)]
    assert Peers().carry((rows,), lambda owner, block: block + owner, torch.add).equal(rows)
