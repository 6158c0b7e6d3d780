"""What a tower computes and keeps for one pair: counted on shapes, without a number in memory.

A model on torch's meta device runs its forward on shapes alone. What that device does differently
from a GPU under Lightning's mixed precision is put back: attention is the fused kernel, which keeps
no scores, and matrix products read half-precision copies while norms and the residual stream stay
in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class TowerCost:
    """flops: of one sample's forward, a multiplication and an addition counted as two.

    sample_bytes: kept for the backward for each sample of a forward. fixed_bytes: kept whatever the
    number of samples: half-precision copies of weights.
    parameters, trained: elements, those that learn. largest_block: parameters of the largest block.
    """

    flops: int
    sample_bytes: int
    fixed_bytes: int
    parameters: int
    trained: int
    largest_block: int


class LikeAGpu(TorchFunctionMode):
    """Attention by the fused kernel; half: matrix products as autocast does them, None for none."""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half
        self.copies: dict[int, Tensor] = {}  # of weights: autocast makes one a step

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__:
            return True  # "is all of this words?", asks Hugging Face's BERT: shapes cannot say
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._halved(x) for x in args[:3])
            causal = kwargs.get("is_causal", False)
            attend = torch.ops.aten._scaled_dot_product_flash_attention
            return attend(query, key, value, 0.0, causal)[0]
        if self.half is not None and func is F.linear:
            return func(*(self._halved(x) for x in args), **kwargs)
        if self.half is not None and func in (F.layer_norm, F.rms_norm):
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _halved(self, x: Tensor | None) -> Tensor | None:
        if x is None or self.half is None or x.dtype == self.half:
            return x
        if isinstance(x, nn.Parameter):
            return self.copies.setdefault(id(x), x.to(self.half))
        return x.to(self.half)


class KeptBytes:
    """Counts what autograd keeps, each storage once, without parameters; `blocks` apart.

    Price: the storages are held until it is gone, so that none is counted twice or missed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.total = 0
        self.inputs = self.largest = self.inside = 0
        self._entered: list[int] = []

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        known = storage._cdata
        if known not in self.parameters and known not in self.storages:
            self.storages[known] = storage
            self.total += storage.nbytes()
        return x

    def enter(self, module: nn.Module, inputs: tuple) -> None:
        self._entered.append(self.total)
        self.inputs += inputs[0].nbytes

    def leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        kept = self.total - self._entered.pop()
        self.inside += kept
        self.largest = max(self.largest, kept)

    @property
    def recomputed(self) -> int:
        """The total where each block keeps its input alone and is computed anew in the backward."""
        return self.total - self.inside + self.inputs + self.largest


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The longest list of modules in a tower. Raises ValueError for a tower without any."""
    lists = [module for module in tower.modules() if type(module) is nn.ModuleList]
    if not lists:
        raise ValueError(f"{type(tower).__name__} has no list of blocks to count")
    return max(lists, key=len)


def kept_bytes(
    model: nn.Module, forward: Callable[[], object], half: torch.dtype | None, *, recompute: bool
) -> int:
    """Bytes that one forward keeps for its backward."""
    kept = KeptBytes(model)
    hooks = []
    for block in blocks_of(model):
        hooks += [block.register_forward_pre_hook(kept.enter)]
        hooks += [block.register_forward_hook(kept.leave)]
    with LikeAGpu(half), torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
        forward()
    for hook in hooks:
        hook.remove()
    return kept.recomputed if recompute else kept.total


def forward_flops(forward: Callable[[], object]) -> int:
    """Operations of a forward on the meta device, a multiplication and an addition counted as
    two.
    """
    with FlopCounterMode(display=False) as counter, LikeAGpu(None):
        forward()
    return counter.get_total_flops()


def tower_cost(
    tower: nn.Module,
    projection: nn.Module,
    forward: Callable[[int], object],
    *,
    half: torch.dtype | None,
    recompute: bool,
) -> TowerCost:
    """forward(batch): the tower and its projection on that many samples, all on the meta device.

    half: what matrix products are computed in under mixed precision; None for the weights' own.
    recompute: activation checkpointing of the blocks.
    """
    both = nn.ModuleDict({"tower": tower, "projection": projection})
    one, two = (kept_bytes(both, lambda n=n: forward(n), half, recompute=recompute) for n in (1, 2))
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks_of(tower)]
    return TowerCost(
        flops=forward_flops(lambda: forward(1)),
        sample_bytes=two - one,
        fixed_bytes=2 * one - two,
        parameters=sum(p.numel() for p in both.parameters()),
        trained=sum(p.numel() for p in both.parameters() if p.requires_grad),
        largest_block=max(counts),
    )
