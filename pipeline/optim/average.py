"""An exponential moving average of weights: the maths, without a trainer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class ExponentialAverage:
    """average <- m * average + (1 - m) * weight, once a step.

    decay: m, in [0, 1).  final_decay: m rises to it by a half cosine over the run, in [decay, 1]
    (BYOL, arXiv:2006.07733, sec. 3.3; A-CLIP, arXiv:2212.08653: 0.996 to 1); None keeps m constant.
    """

    def __init__(self, *, decay: float, final_decay: float | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} is outside [0, 1)")
        if final_decay is not None and not decay <= final_decay <= 1:
            raise ValueError(f"final_decay {final_decay} is outside [decay={decay}, 1]")
        self.decay, self.final_decay = decay, final_decay

    def decay_at(self, step: int, total: int) -> float:
        """m of the step with this index, 0 <= step, in a run of `total` steps."""
        if self.final_decay is None:
            return self.decay
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return self.final_decay - (self.final_decay - self.decay) * falling

    @torch.no_grad()
    def update(
        self, averages: Sequence[Tensor], weights: Sequence[Tensor], *, step: int, total: int
    ) -> None:
        """In place. Averages are float32, weights of any floating type; shapes are equal."""
        if averages:
            weights = [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)]
            torch._foreach_lerp_(list(averages), weights, 1 - self.decay_at(step, total))
