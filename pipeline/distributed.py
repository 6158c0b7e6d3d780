"""What a process knows about its peers, a gather that gradients flow through, and a ring.

Every function is right without a process group: one process is a world of size 1.
Letters: B local rows, G = B * world size global rows, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


# torch 2.13 renamed both collectives and warns at the old names. Delete when we need torch >= 2.13.
_OLD_NAMES = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}


def _collective(name: str) -> Callable[..., Any]:
    return getattr(dist, name, None) or getattr(dist, _OLD_NAMES[name])


def rank() -> int:
    """This process's index in the default group; 0 without a group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """Number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if _in_group() else 1


def barrier() -> None:
    """Wait for every process; returns at once without a group."""
    if _in_group():
        dist.barrier()


def gather_counts(count: int, device: torch.device) -> list[int]:
    """One integer of every rank, in rank order. `device`: where the backend's tensors must live.

    Waits for the device: once in a run is free, once in a step is not.
    """
    if world_size() == 1:
        return [count]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    own = torch.tensor([count], dtype=torch.int64, device=device)
    _collective("all_gather_single")(counts, own)
    return counts.tolist()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
        _collective("all_gather_single")(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        local = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        _collective("reduce_scatter_single")(local, grad.contiguous(), op=dist.ReduceOp.SUM)
        return local


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, through which gradients return to the rank that owns them.

    rows: (B, D), the same B, D and dtype on every rank. That is assumed, not checked here: a check
    would be a second collective with a wait in every step (`CachedContrastiveStep` checks where it
    is free).
    Returns (G, D); without a process group, `rows` itself.
    Backward is a reduce-scatter with SUM. When each rank's loss is the mean over its own rows, the
    sum makes the gradient `world_size` times that of the global mean, and data-parallel averaging
    divides by `world_size`.
    Every rank must run the backward, or the others wait.
    """
    return rows if world_size() == 1 else _AllGather.apply(rows)


@dataclass(frozen=True)
class Peers:
    """The processes whose pairs make up one global batch, as seen from one of them.

    What a loss needs to know of them; the default is a process on its own. rank: place of the local
    rows among all rows. size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def gather(self, rows: Tensor) -> Tensor:
        """(B, D) -> (G, D): see `all_gather_with_grad`."""
        return rows if self.size == 1 else _AllGather.apply(rows)

    def ring(self, *block: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(owner, block) of every rank, the own one first: each block moves one rank on a step.

        block: contiguous tensors, the same shapes and dtypes on every rank, left unchanged until
        the iteration ends. No gradient. While the caller works on a block the next one arrives, so
        that three are alive at most. Every rank must iterate to the end, or the others wait.
        """
        for step in range(self.size):
            moving = _Moving(self, block) if step < self.size - 1 else None
            yield (self.rank - step) % self.size, block
            if moving is not None:
                block = moving.arrived()

    def carry(
        self,
        block: Sequence[Tensor],
        visit: Callable[..., Tensor],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Take `block` past every rank and return what all of them had to add to it.

        visit(owner, *block) -> this rank's part for that owner's block.  merge(a, b): joins two
        parts, in ring order.  As in `ring` for the rest: blocks and parts travel while the next
        block is visited; only the last part's way home is waited for.
        """
        moving, part = None, None
        for owner, tensors in self.ring(*block):
            part = visit(owner, *tensors)
            if moving is not None:
                part = merge(*moving.arrived(), part)
            if self.size > 1:
                moving = _Moving(self, (part,))
        return part if moving is None else moving.arrived()[0]


class _Moving:
    """Tensors on their way to the next rank, while the previous one's arrive."""

    def __init__(self, peers: Peers, tensors: Sequence[Tensor]) -> None:
        self.sent = tuple(tensors)  # alive until they have left
        self.received = tuple(torch.empty_like(tensor) for tensor in tensors)
        after, before = (peers.rank + 1) % peers.size, (peers.rank - 1) % peers.size
        sends = [dist.P2POp(dist.isend, tensor, after) for tensor in self.sent]
        receives = [dist.P2POp(dist.irecv, tensor, before) for tensor in self.received]
        self.work = dist.batch_isend_irecv([*sends, *receives])

    def arrived(self) -> tuple[Tensor, ...]:
        for work in self.work:
            work.wait()
        return self.received


def peers() -> Peers:
    """The processes of the default group; one alone without a group."""
    return Peers(rank(), world_size())
