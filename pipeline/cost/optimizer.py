"""How many bytes an optimizer keeps for a model: asked of the optimizer itself, on a small copy."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Optimizer(Protocol):
    def make(self, model: nn.Module) -> torch.optim.Optimizer: ...


class Shrunk(nn.Module):
    """A model's parameters by name and number of dimensions, none of which is longer than two."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.small = {
            name: nn.Parameter(
                torch.ones([min(2, size) for size in parameter.shape], dtype=parameter.dtype),
                parameter.requires_grad,
            )
            for name, parameter in model.named_parameters()
        }

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.small.items())


def state_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Bytes of the state after a step on the parameters that learn.

    A step is taken on a small copy, and what it leaves is counted at the sizes of `model`, whose
    parameters may be on the meta device.
    """
    copy = Shrunk(model)
    made = optimizer.make(copy)
    for parameter in copy.small.values():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    made.step()
    total = 0
    for name, whole in model.named_parameters():
        small = copy.small[name]
        total += sum(
            _elements(value.shape, small.shape, whole.shape) * value.element_size()
            for value in made.state.get(small, {}).values()
            if isinstance(value, torch.Tensor)
        )
    return total


def _elements(state: torch.Size, small: torch.Size, whole: torch.Size) -> int:
    """A dimension that is as long as the small parameter's is as long as the whole one's."""
    if len(state) != len(small):
        return math.prod(state)
    sizes = zip(state, small, whole, strict=True)
    return math.prod(full if kept == short else kept for kept, short, full in sizes)
