"""A moving average of the model's weights beside the run, in every checkpoint."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.distributed import rank
from pipeline.optim.average import ExponentialAverage
from pipeline.trainer.checkpoints import Checkpoints

log = logging.getLogger(__name__)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the whole of what is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_of(weight: Tensor, like: Tensor) -> Tensor:
    """A float32 copy, sharded as `like`; weight may be whole."""
    weight = weight.detach().to(device=like.device, dtype=torch.float32)
    if isinstance(like, DTensor) and not isinstance(weight, DTensor):
        return distribute_tensor(weight, like.device_mesh, like.placements)
    return weight.clone()


class Ema(pl.Callback):
    """Averages the weights after every optimizer step; evaluation reads them with weights=ema.

    decay, final_decay: see pipeline.optim.average.ExponentialAverage.
    Averaged is every parameter of the module's `model` that has been trained so far; a parameter
    that a phase has resized starts anew. Each rank averages its own shard (FSDP2) or all (DDP,
    ZeRO-1/2). The checkpoint holds {"step": steps averaged, "weights": {name: float32}}, whole
    whatever the strategy, names as in the model's state_dict.
    Price: four bytes a parameter of device memory, one pass over the weights a step.
    Raises ValueError under ZeRO-3, whose parameters are not tensors between steps.
    """

    def __init__(self, *, decay: float, final_decay: float | None = None) -> None:
        self.average = ExponentialAverage(decay=decay, final_decay=final_decay)
        self.step = 0
        self.weights: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for before in trainer.callbacks[: trainer.callbacks.index(self)]:
            # else a checkpoint would hold the average of the step before
            assert not isinstance(before, Checkpoints), "Ema comes before Checkpoints"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights, or place the averages of a checkpoint where the weights are."""
        named = dict(pl_module.model.named_parameters())
        if any(hasattr(parameter, "ds_id") for parameter in named.values()):
            raise ValueError(
                "ema: ZeRO-3 keeps no parameter whole or in a shard of its own: set ema=none, or "
                "use strategy ddp, fsdp, or ZeRO-1/2"
            )
        for name in self.weights.keys() - named.keys():
            raise ValueError(f"the checkpoint averages {name}, which the model does not have")
        for name, average in self.weights.items():
            self.weights[name] = copy_of(average, named[name])
        self._follow(named)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """One update for each optimizer step; none for a step that was skipped."""
        if trainer.global_step <= self.step:
            return
        named = dict(pl_module.model.named_parameters())
        self._follow(named)
        names = list(self.weights)
        self.average.update(
            [local(self.weights[name]) for name in names],
            [local(named[name].detach()) for name in names],
            step=self.step,
            total=trainer.max_steps,
        )
        self.step = trainer.global_step

    def _follow(self, named: dict[str, nn.Parameter]) -> None:
        """Start with parameters that are new to training, or have another shape."""
        for name, parameter in named.items():
            average = self.weights.get(name)
            resized = average is not None and average.shape != parameter.shape
            if resized:
                log.info("ema: %s is now %s: starts anew", name, tuple(parameter.shape))
            if resized or (average is None and parameter.requires_grad):
                self.weights[name] = copy_of(parameter, parameter)

    def state_dict(self) -> dict[str, Any]:
        """On every rank, as sharded averages are gathered; only rank 0 returns the weights."""
        weights = {}
        for name, average in self.weights.items():
            gathered = whole(average)
            if rank() == 0:
                weights[name] = gathered.cpu()
        return {"step": self.step, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whole weights on the CPU; they are placed when training starts."""
        self.step, self.weights = state_dict["step"], dict(state_dict["weights"])
