"""Adafactor: second moments of a matrix as one row and one column (arXiv:1804.04235)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.optim.groups import Rates


class Adafactor:
    """torch.optim.Adafactor over the decay groups, where optimizer state must cost no memory.

    A step is min(lr, 1 / sqrt(steps)) times the parameter's root mean square (at least
    min_scale) long: lr is relative, 1e-2 is the paper's.  beta2_decay: the second moment's decay
    is 1 - step ** beta2_decay.  clip: bound of an update's root mean square.
    No first moment, so not the variant SigLIP was trained with (arXiv:2106.04560, sec. 3.4).
    """

    def __init__(
        self,
        *,
        lr: float,
        beta2_decay: float = -0.8,
        min_scale: float = 1e-3,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        towers: Mapping[str, Mapping[str, float]] | None = None,
        no_decay: Sequence[str] = (),
    ) -> None:
        if beta2_decay > 0 or min_scale <= 0 or clip < 1:
            raise ValueError(
                f"beta2_decay={beta2_decay} must not be positive, min_scale={min_scale} must be, "
                f"clip={clip} at least 1"
            )
        self.rates = Rates(lr=lr, weight_decay=weight_decay, towers=towers, no_decay=no_decay)
        self.options = {"beta2_decay": beta2_decay, "eps": (None, min_scale), "d": clip}

    def make(self, model: nn.Module) -> torch.optim.Adafactor:
        """A torch optimizer; each group remembers its `base_lr` for the schedule."""
        return torch.optim.Adafactor(self.rates.groups(model), **self.options)
