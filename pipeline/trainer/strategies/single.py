"""How a step runs in one process with whole parameters; the other adapters differ from this one."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Reduce = Literal["once", "each"]  # when gradients are sent: a step, or a micro-batch


def check_reduce(word: str) -> None:
    """Raises ValueError for a word that is none of them."""
    if word not in get_args(Reduce):
        raise ValueError(f"trainer.strategy.reduce_gradients={word}: once or each")


class SingleProcess:
    """What a training step asks of a strategy, answered for one process.

    model: the module as the strategy wrapped it; its forward is all that carries gradient.
    backward: how the trainer back-propagates, with the loss scale of its precision.
    A step is: encode and backward inside session(), clip when gradients are unscaled, the
    optimizer's step, outcome, clamp.
    """

    def __init__(
        self, *, model: nn.Module, backward: Callable[[Tensor], None] = Tensor.backward
    ) -> None:
        self.model = model
        self._backward = backward
        self._norm, self._applied = 0.0, True

    def session(self) -> AbstractContextManager:
        """Around all forwards and backwards of a step."""
        return nullcontext()

    def encode(self, *chunk: Tensor | None) -> Any:
        """The wrapped module's forward, which prepares no reduction."""
        return self.model(*chunk)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; the last call of a step reduces them over the processes."""
        self._backward(loss)

    def clip(self, limit: float | None) -> None:
        """Shorten the whole gradient to `limit`, if it is longer; None only measures it.

        A gradient that is not finite is dropped, and the optimizer's step changes nothing. Waits
        for the device once: whether to skip is decided here.
        """
        norm = self._total_norm(self._gradients())
        self._norm = norm.item()
        self._applied = math.isfinite(self._norm)
        if not self._applied:
            for parameter in self.model.parameters():
                parameter.grad = None
        elif limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)

    def outcome(self) -> tuple[float, bool]:
        """The gradient's norm before clipping, and whether the optimizer's step changed weights."""
        return self._norm, self._applied

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, least: float, most: float) -> None:
        """Put a parameter back into [least, most]."""
        parameter.clamp_(least, most)

    def _gradients(self) -> Iterable[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _total_norm(self, gradients: Iterable[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(gradients)
