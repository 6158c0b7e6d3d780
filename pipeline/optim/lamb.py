"""LAMB: Adam's direction, with a step as long as the parameter is large (arXiv:1904.00962)."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.optim.groups import Rates, moments
from pipeline.optim.parts import Whole


class Lamb:
    """LAMB for batches in the tens of thousands, EVA-CLIP's choice (arXiv:2303.15389, sec. 2).

    update u = m / (sqrt(v) + eps) + weight_decay * w with bias-corrected m, v (algorithm 2);
    step = lr * ratio * u, ratio = |w| / |u| within [min_coeff, max_coeff], 1 where either norm is
    0. Parameters that are not decayed (gains, biases, no_decay) have ratio 1: AdamW's step.
    This is the paper's. What EVA-CLIP ran is DeepSpeed's FusedLamb on ZeRO-1's flat pieces: one
    ratio a group and rank, gains and biases too, of a direction whose step size alone is corrected,
    so that weight_decay is multiplied by sqrt(1 - beta2^t) / (1 - beta1^t).
    The defaults are EVA-CLIP's; the bounds are those of DeepSpeed's implementation, the paper
    leaves them open.
    Price: AdamW's memory and one more temporary copy of the largest group; two norms a matrix,
    under ZeRO summed over the ranks, one reduction of two numbers a matrix for each group.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: Sequence[float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.05,
        min_coeff: float = 0.01,
        max_coeff: float = 10.0,
        towers: Mapping[str, Mapping[str, float]] | None = None,
        no_decay: Sequence[str] = (),
    ) -> None:
        if not 0 < min_coeff <= max_coeff:
            raise ValueError(f"min_coeff={min_coeff}, max_coeff={max_coeff}: 0 < min <= max")
        self.rates = Rates(lr=lr, weight_decay=weight_decay, towers=towers, no_decay=no_decay)
        self.betas, self.eps = moments(betas, eps)
        self.bounds = min_coeff, max_coeff

    def make(self, model: nn.Module) -> "LambOptimizer":
        """A torch optimizer; each group remembers its `base_lr` for the schedule."""
        groups = self.rates.groups(model)
        return LambOptimizer(groups, betas=self.betas, eps=self.eps, bounds=self.bounds)


class LambOptimizer(torch.optim.Optimizer):
    """The step of Lamb on the groups of Rates; state as AdamW's: step, exp_avg, exp_avg_sq.

    parts: where the parameters are, if a strategy hands over something else than parameters.
    """

    def __init__(
        self,
        groups: Sequence[dict],
        *,
        betas: tuple[float, ...],
        eps: float,
        bounds: tuple[float, float],
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "bounds": bounds})
        self.parts = Whole()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.parts.check(self.param_groups, "LAMB")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: Mapping, params: list[Tensor]) -> None:
        updates = self._adam_directions(group, params)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        if group["decayed"]:
            low, high = group["bounds"]
            changes = self.parts.cut(params, updates)
            norms = self.parts.norms([*self.parts.cut(params, params), *changes])
            ratios = [
                torch.where((w > 0) & (u > 0), (w / u).clamp(low, high), 1.0)
                for w, u in zip(norms[: len(changes)], norms[len(changes) :], strict=True)
            ]
            torch._foreach_mul_(changes, ratios)
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _adam_directions(self, group: Mapping, params: list[Tensor]) -> list[Tensor]:
        """Bias-corrected m / (sqrt(v) + eps), moments updated."""
        for parameter in params:
            if "exp_avg_sq" not in self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states, grads = [self.state[p] for p in params], [p.grad for p in params]
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        beta_1, beta_2 = group["betas"]
        torch._foreach_lerp_(first, grads, 1 - beta_1)
        torch._foreach_mul_(second, beta_2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta_2)
        for state in states:
            state["step"] += 1
        steps = [state["step"].item() for state in states]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta_2**step) for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(denominators, [1 - beta_1**step for step in steps])
        return list(torch._foreach_div(first, denominators))
