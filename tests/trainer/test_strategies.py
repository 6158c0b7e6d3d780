"""A step on every strategy leaves the gradients of one process that has all pairs in one graph.

Dropout and dropped tokens are on. Letters: B pairs of a rank.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed import Peers
from pipeline.trainer import cached_step
from pipeline.trainer.random_state import RandomState
from pipeline.trainer.strategies.ddp import Replicated
from pipeline.trainer.strategies.scalars import widen_scalars
from pipeline.trainer.strategies.zero import Zero
from tests.trainer import strategy_cases as cases

WORLD = 2
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
DOUBLE, SINGLE = TOLERANCE

Case = tuple[str, torch.dtype, int]
FAST: dict[Case, Callable[[int], Any]] = {
    **{("ddp", DOUBLE, m): lambda i, m=m: cases.run_ddp(i, DOUBLE, m) for m in cases.MICRO_BATCHES},
    ("ddp", SINGLE, 3): lambda i: cases.run_ddp(i, SINGLE, 3),
    ("fsdp", DOUBLE, 3): lambda i: cases.run_fsdp(i, DOUBLE, 3),
    ("fsdp", DOUBLE, 8): lambda i: cases.run_fsdp(i, DOUBLE, 8),
    ("fsdp each", SINGLE, 3): lambda i: cases.run_fsdp(i, SINGLE, 3, "each"),
    **{
        (f"zero {stage}", SINGLE, 3): lambda i, stage=stage: cases.run_zero(i, stage, 3)
        for stage in range(4)
    },
    **{
        (f"zero {stage} each", SINGLE, 3): lambda i, stage=stage: cases.run_zero(
            i, stage, 3, reduce_gradients="each"
        )
        for stage in (2, 3)
    },
}
SLOW: dict[Case, Callable[[int], Any]] = {
    ("fsdp", DOUBLE, 1): lambda i: cases.run_fsdp(i, DOUBLE, 1),
    ("fsdp each", DOUBLE, 1): lambda i: cases.run_fsdp(i, DOUBLE, 1, "each"),
    ("fsdp checkpointing", DOUBLE, 3): lambda i: cases.run_fsdp(i, DOUBLE, 3, checkpointing=True),
    ("zero 2 checkpointing", SINGLE, 3): lambda i: cases.run_zero(i, 2, 3, checkpointing=True),
    ("zero 3 checkpointing", SINGLE, 3): lambda i: cases.run_zero(i, 3, 3, checkpointing=True),
    **{
        (
            f"zero {s}{' offload' * o}{' each' * (r == 'each')}",
            SINGLE,
            m,
        ): lambda i, s=s, o=o, r=r, m=m: cases.run_zero(i, s, m, offload=o, reduce_gradients=r)
        for s in range(4)
        for m in cases.MICRO_BATCHES
        for o in (False, True)
        for r in ("once", "each")
        if (s or not o) and (s >= 2 or r == "once") and (m != 3 or o)
    },
}
FOUR: dict[Case, Callable[[int], Any]] = {
    (name, dtype, m): lambda i, run=run, dtype=dtype, m=m: run(i, dtype, m)
    for name, run in (("ddp", cases.run_ddp), ("fsdp", cases.run_fsdp))
    for dtype in TOLERANCE
    for m in (3, 8)
}


class WithoutGradient(Peers):
    def gather(self, rows: Tensor) -> Tensor:
        """The own rows keep their gradient and the others' do not (open_clip's default)."""
        gathered = [torch.empty_like(rows) for _ in range(WORLD)]
        dist.all_gather(gathered, rows.detach())
        gathered[dist.get_rank()] = rows
        return torch.cat(gathered)


class EveryTime(Replicated):
    """Reduces after every micro-batch."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=True)


class WithoutBoundary(Zero):
    """Leaves deepspeed to think that every backward is a step's last."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.coalesced = False

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._backward(loss)


def run_controls(index: int) -> dict[str, Any]:
    """What must be noticed."""
    results: dict[str, Any] = {}
    replayed, RandomState.replayed = RandomState.replayed, lambda _: nullcontext()
    results["no replay"] = cases.run_ddp(index, DOUBLE, 3)
    RandomState.replayed = replayed

    correct, cached_step.peers = cached_step.peers, lambda: WithoutGradient(index, WORLD)
    results["no gradient through the gather"] = cases.run_ddp(index, DOUBLE, 3)
    cached_step.peers = correct

    for stage in (1, 2):
        trained = cases.Trained(SINGLE)
        shapes, engine = widen_scalars(trained), cases.engine_of(trained, stage)
        adapter = WithoutBoundary(model=engine, backward=engine.backward, reduce_gradients="each")
        results[f"no boundary, zero {stage}"] = cases.zero_steps(index, trained, shapes, adapter, 3)

    trained = cases.Trained(DOUBLE)
    wrapped, reduced = cases.counting(trained)
    cases.two_steps(trained, EveryTime(model=wrapped), 3, index)
    results["every time"] = sum(reduced)
    return results


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def run_unequal(index: int) -> list[str]:
    batch, trained = cases.batch_of(index, SINGLE), cases.Trained(SINGLE)
    wrapped = DistributedDataParallel(trained)
    step = cases.step_of(trained, Replicated(model=wrapped), cases.BATCH)
    messages = [message_of(lambda: step(*(rows[index:] for rows in batch)))]
    step(*batch)
    return [*messages, message_of(lambda: step(*(rows[1:] for rows in batch)))]


def run_rank(index: int, world: int, which: str, directory: str) -> None:
    cases.join(index, world, directory)
    table = {"fast": FAST, "slow": SLOW, "four": FOUR}[which]
    results: dict[Any, Any] = {case: run(index) for case, run in table.items()}
    if which == "fast":
        results["controls"], results["unequal"] = run_controls(index), run_unequal(index)
        results["lamb"] = {stage: cases.run_lamb(index, stage) for stage in (None, 1, 2, 3)}
        results["lamb"]["offload"] = cases.run_lamb(index, 2, offload=True)
    cases.leave(index, directory, results)


def spawned(folder: Path, world: int, which: str) -> list[dict[Any, Any]]:
    mp.spawn(run_rank, args=(world, which, os.fspath(folder)), nprocs=world)
    return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return spawned(tmp_path_factory.mktemp("two"), WORLD, "fast")


@pytest.fixture(scope="module")
def two_slow(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return spawned(tmp_path_factory.mktemp("two_slow"), WORLD, "slow")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return spawned(tmp_path_factory.mktemp("four"), 4, "four")


def largest_difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    assert {"model.log_logit_scale", "objective.terms.slanted.gain"} <= expected.keys()
    return max((gradients[name] - expected[name]).abs().max().item() for name in expected)


def check(case: Case, ranks: list[dict[Any, Any]]) -> None:
    _, dtype, micro = case
    expected, loss = cases.oracle(len(ranks), dtype, micro)
    for steps in zip(*(results[case]["steps"] for results in ranks), strict=True):
        for step in steps:
            assert largest_difference(step["gradients"], expected) <= TOLERANCE[dtype]
        losses = [step["loss"] for step in steps]
        assert sum(losses) / len(losses) == pytest.approx(loss, rel=1e-6)
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("case", FAST, ids=str)
def test_two_processes_equal_the_oracle(case: Case, two: list[dict[Any, Any]]) -> None:
    check(case, two)


@pytest.mark.parametrize("stage", [1, 2, 3, "offload"])
def test_lamb_on_pieces_is_lamb_on_whole_parameters(
    stage: int | str, two: list[dict[Any, Any]]
) -> None:
    """Three steps, rates by tower and depth; bounds that some parameters meet."""
    start = dict(cases.Trained(SINGLE).named_parameters())
    for results in two:
        whole, pieces = results["lamb"][None], results["lamb"][stage]
        assert largest_difference(pieces, whole) <= 1e-6
        moved = min((whole[name] - start[name]).abs().max().item() for name in whole)
        assert moved > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_two_processes_equal_the_oracle_also(case: Case, two_slow: list[dict[Any, Any]]) -> None:
    check(case, two_slow)


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_processes_equal_the_oracle(case: Case, four: list[dict[Any, Any]]) -> None:
    check(case, four)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro", cases.MICRO_BATCHES)
def test_one_process_equals_the_oracle(micro: int, checkpointing: bool) -> None:
    """Activation checkpointing runs a forward a third time, with the same dropout."""
    expected, _ = cases.oracle(1, DOUBLE, micro)
    trained = cases.Trained(DOUBLE, checkpointing=checkpointing)
    torch.manual_seed(100)
    cases.step_of(trained, cases.SingleProcess(model=trained), micro)(*cases.batch_of(0, DOUBLE))
    assert largest_difference(cases.whole_gradients(trained), expected) <= 1e-12


def test_the_oracle_can_tell() -> None:
    """No gradient is so small that a missing one would pass as equal, and dropout matters."""
    expected, _ = cases.oracle(WORLD, DOUBLE, 3)
    assert min(gradient.abs().max().item() for gradient in expected.values()) > 1e-3
    assert largest_difference(expected, cases.oracle(WORLD, DOUBLE, 8)[0]) > 1e-3


@pytest.mark.parametrize("micro", cases.MICRO_BATCHES)
def test_ddp_reduces_every_parameter_once(micro: int, two: list[dict[Any, Any]]) -> None:
    numbers = sum(p.numel() for p in cases.Trained(SINGLE).parameters())
    for results in two:
        assert results["ddp", DOUBLE, micro]["reduced"] == 2 * numbers  # in two steps


def test_the_others_reduce_as_often_as_in_one_micro_batch(two: list[dict[Any, Any]]) -> None:
    for results in two:
        whole = results["fsdp", DOUBLE, 8]["steps"][-1]["sent"]["reduce_scatter_base"]
        assert results["fsdp", DOUBLE, 3]["steps"][-1]["sent"]["reduce_scatter_base"] == whole
        assert results["fsdp each", SINGLE, 3]["steps"][-1]["sent"]["reduce_scatter_base"] > whole
        sent = {s: results[f"zero {s}", SINGLE, 3]["steps"][0]["sent"] for s in range(4)}
        each = {s: results[f"zero {s} each", SINGLE, 3]["steps"][0]["sent"] for s in (2, 3)}
        assert sent[1]["allreduce"] == sent[2]["allreduce"] < each[2]["allreduce"]
        assert sent[3]["reduce_scatter_base"] < each[3]["reduce_scatter_base"]


def test_norms_are_those_of_the_whole_gradient(two: list[dict[Any, Any]]) -> None:
    expected, _ = cases.oracle(WORLD, DOUBLE, 3)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for results in two:
        fsdp = results["fsdp", DOUBLE, 3]
        assert fsdp["norm"] == pytest.approx(norm, rel=1e-9)
        assert fsdp["clipped"] == pytest.approx(0.01, rel=1e-4)
        for stage in range(4):
            outcome = results[f"zero {stage}", SINGLE, 3]["outcome"]
            assert outcome == (pytest.approx(norm, rel=1e-5), True)


@pytest.mark.parametrize(
    ("control", "dtype"),
    [
        ("no replay", DOUBLE),
        ("no gradient through the gather", DOUBLE),
        ("no boundary, zero 1", SINGLE),
        ("no boundary, zero 2", SINGLE),
    ],
)
def test_controls_are_noticed(control: str, dtype: torch.dtype, two: list[dict[Any, Any]]) -> None:
    expected, _ = cases.oracle(WORLD, dtype, 3)
    for results in two:
        step = results["controls"][control]["steps"][-1]
        assert largest_difference(step["gradients"], expected) > 1e-3


def test_reducing_in_every_micro_batch_is_noticed(two: list[dict[Any, Any]]) -> None:
    """By its traffic alone: the gradient is right, being a mean over ranks of means over ranks."""
    numbers = sum(p.numel() for p in cases.Trained(SINGLE).parameters())
    assert [results["controls"]["every time"] for results in two] == [2 * 3 * numbers] * WORLD


def test_unequal_local_batches_are_named_on_every_rank(two: list[dict[Any, Any]]) -> None:
    for index, results in enumerate(two):
        first, later = results["unequal"]
        assert "local batches differ between ranks: [8, 7]" in first
        assert f"changed from 8 to 7 on rank {index}" in later
