"""AdamW over the decay groups, as a component: hyper-parameters now, parameters later."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.optim.groups import Rates, moments, on_meta


class AdamW:
    """Decoupled weight decay (arXiv:1711.05101) on parameters of more than one dimension.

    The defaults are CLIP's for ViT (arXiv:2103.00020, table 19).
    towers, no_decay: see pipeline.optim.groups.Rates.
    fused: torch's one-pass kernel instead of a loop over parameters and operations; the same step
    but for rounding, at about a quarter of the time on a CPU.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: Sequence[float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        towers: Mapping[str, Mapping[str, float]] | None = None,
        no_decay: Sequence[str] = (),
        fused: bool = True,
    ) -> None:
        self.rates = Rates(lr=lr, weight_decay=weight_decay, towers=towers, no_decay=no_decay)
        (self.betas, self.eps), self.fused = moments(betas, eps), fused

    def make(self, model: nn.Module) -> torch.optim.AdamW:
        """A torch optimizer; each group remembers its `base_lr` for the schedule."""
        groups = self.rates.groups(model)
        fused = self.fused and not on_meta(groups)
        optimizer = torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=fused)
        # Else a GradScaler leaves unscaling to the fused kernel, behind the clipping.
        optimizer._step_supports_amp_scaling = False
        return optimizer
