"""Which part of which parameter is where in the flat float32 pieces of a ZeRO engine."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.optim.parts import Whole


class Pieces(Whole):
    """A tensor is this rank's piece of a group (stages 1, 2) or of some of its parameters (3)."""

    def __init__(self, engine: Any) -> None:
        self.device, self.group = engine.device, engine.optimizer.dp_process_group
        self.places = dict(_places(engine.optimizer))

    def check(self, groups: Sequence[Mapping[str, Any]], what: str) -> None:
        """Pieces they are, and known."""

    def cut(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return [
            value.narrow(0, start, length)
            for flat, value in zip(params, values, strict=True)
            for start, length in self.places[id(flat)]
        ]

    def norms(self, parts: Sequence[Tensor]) -> list[Tensor]:
        # Offloaded pieces are in the host's memory, from where the device's backend sends nothing.
        squares = torch.stack(torch._foreach_norm(parts)).to(self.device).square_()
        dist.all_reduce(squares, group=self.group)
        return list(squares.sqrt_().to(parts[0].device).unbind())


def _places(optimizer: Any) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(id of a flat piece, (start, length) of each of its parameters in it; length 0: elsewhere).

    The last piece of stages 1 and 2, and of every parameter in stage 3, ends in padding, which is
    nobody's.
    """
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        pieces = optimizer.single_partition_of_fp32_groups
        for flat, parameters in zip(pieces, optimizer.bit16_groups, strict=True):
            addresses = [
                mapping.get_hp_fragment_address()
                if (mapping := parameter._hp_mapping) is not None
                else None
                for parameter in parameters
            ]
            yield id(flat), [(a.start, a.numel) if a is not None else (0, 0) for a in addresses]
        return
    for flat, parameters in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
    ):
        yield id(flat), [_place(optimizer, parameter) for parameter in parameters]


def _place(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int]:
    _, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    before = size * dist.get_rank(parameter.ds_process_group)
    return start, min(size, max(0, parameter.ds_numel - before))
