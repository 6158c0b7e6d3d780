"""AdamW over the decay groups, as a component: hyper-parameters now, parameters later."""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.optim.groups import parameter_groups


class AdamW:
    """Decoupled weight decay (arXiv:1711.05101) on parameters of more than one dimension.

    The defaults are CLIP's for ViT (arXiv:2103.00020, table 19).
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: Sequence[float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
    ) -> None:
        if lr <= 0 or weight_decay < 0:
            raise ValueError(
                f"lr={lr} must be positive and weight_decay={weight_decay} not negative"
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay

    def make(self, model: nn.Module) -> torch.optim.AdamW:
        """A torch optimizer; each group remembers its `base_lr` for the schedule."""
        groups = parameter_groups(model, weight_decay=self.weight_decay)
        for group in groups:
            group["base_lr"] = self.lr
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)
