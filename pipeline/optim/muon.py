"""Muon for the matrices inside the blocks, AdamW for the rest, in one torch optimizer."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.optim.groups import Rates, block_of, check_whole, moments, on_meta, shape_of


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is meant for it: a matrix inside a block; not embeddings, not projections."""
    return block_of(name) is not None and len(shape_of(parameter)) == 2


class Muon:
    """Momentum, orthogonalised by Newton-Schulz (K. Jordan et al. 2024), by torch.optim.Muon.

    The update of a matrix (m, n) is scaled by 0.2 sqrt(max(m, n)), so that its entries are as large
    as AdamW's and AdamW's lr and weight_decay can be kept (arXiv:2502.16982, sec. 2.2).
    momentum: of the matrices.  betas, eps: AdamW's for the other parameters.
    The fused query, key and value are one matrix to it. On FSDP2's shards the update is the same
    but for bfloat16 rounding, about 2 % of it.
    Price: one moment instead of two on matrices; about 15 matrix products of the smaller side
    a step and matrix, in bfloat16. No published CLIP recipe uses it.
    Not under ZeRO, which cuts parameters into pieces: the step raises ValueError.
    """

    def __init__(
        self,
        *,
        lr: float,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        betas: Sequence[float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        towers: Mapping[str, Mapping[str, float]] | None = None,
        no_decay: Sequence[str] = (),
    ) -> None:
        if not 0 <= momentum < 1 or not 1 <= newton_schulz_steps < 100:
            raise ValueError(
                f"momentum={momentum} must be in [0, 1) and newton_schulz_steps="
                f"{newton_schulz_steps} in [1, 99]"
            )
        self.rates = Rates(lr=lr, weight_decay=weight_decay, towers=towers, no_decay=no_decay)
        self.muon = {
            "momentum": momentum,
            "ns_steps": newton_schulz_steps,
            "adjust_lr_fn": "match_rms_adamw",
        }
        self.adamw = dict(zip(("betas", "eps"), moments(betas, eps), strict=True))

    def make(self, model: nn.Module) -> "MuonWithAdamW":
        """A torch optimizer; each group remembers its `base_lr` for the schedule."""

        def kind(name: str, parameter: nn.Parameter) -> str:
            return "muon" if is_hidden_matrix(name, parameter) else "adamw"

        groups = self.rates.groups(model, kind=kind)
        if all(group["kind"] == "adamw" for group in groups):
            raise ValueError(
                "optimizer muon: no trained parameter is a matrix inside a numbered block: "
                "use optimizer=adamw"
            )
        return MuonWithAdamW(groups, muon=self.muon, adamw=self.adamw)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's two optimizers on the groups and the state of one, which is what gets saved."""

    def __init__(
        self, groups: Sequence[dict], *, muon: Mapping[str, object], adamw: Mapping[str, object]
    ) -> None:
        super().__init__(groups, {})
        self.inner: dict[str, torch.optim.Optimizer] = {}
        for kind, make, options in (
            ("muon", torch.optim.Muon, muon),
            ("adamw", torch.optim.AdamW, {"fused": not on_meta(groups), **adamw}),
        ):
            own = [group for group in self.param_groups if group["kind"] == kind]
            if own:
                self.inner[kind] = make(own, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_whole(self.param_groups, "Muon")
        for kind, optimizer in self.inner.items():
            # Lent anew at each step: loading a checkpoint or a strategy replaces both.
            optimizer.param_groups = [g for g in self.param_groups if g["kind"] == kind]
            optimizer.state = self.state
            optimizer.step()
        return loss
