"""A moving average of the model's weights beside the run, in every checkpoint."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from pipeline.models.resize import resize_positions
from pipeline.optim.average import ExponentialAverage
from pipeline.trainer.checkpoints import Checkpoints

log = logging.getLogger(__name__)


class Ema(pl.Callback):
    """Averages the weights after every optimizer step; evaluation reads them with weights=ema.

    decay, final_decay: see pipeline.optim.average.ExponentialAverage.
    In a run of phases a cosine of the decay ends with the phase that is running.
    Averaged is every parameter of the module's `model` that has been trained so far; position
    tables are resized with the weights' between phases. Works with whole parameters (DDP,
    ZeRO-1/2) and with FSDP2's shards. The checkpoint holds {"step": steps averaged,
    "weights": {name: float32}}, whole whatever the strategy, names as in the model's state_dict.
    Price: four bytes a parameter of device memory, one pass over the weights a step.
    Raises ValueError under ZeRO-3, whose parameters are not tensors between steps.
    """

    def __init__(self, *, decay: float, final_decay: float | None = None) -> None:
        self.average = ExponentialAverage(decay=decay, final_decay=final_decay)
        self.step = 0
        self.shapes: dict[str, torch.Size] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for before in trainer.callbacks[: trainer.callbacks.index(self)]:
            # else a checkpoint would hold the average of the step before
            assert not isinstance(before, Checkpoints), "Ema comes before Checkpoints"
        # a strategy gives scalars a dimension later, checkpoints have them without
        self.shapes = {name: p.shape for name, p in pl_module.model.named_parameters()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights, or place the averages of a checkpoint where the weights are."""
        named = dict(pl_module.model.named_parameters())
        if any(hasattr(parameter, "ds_id") for parameter in named.values()):
            raise ValueError(
                "ema: ZeRO-3 keeps no parameter whole or in a shard of its own: set ema=none, or "
                "use strategy ddp, fsdp, or ZeRO-1/2"
            )
        self.step = trainer.global_step
        self.average.weights, _ = resize_positions(self.average.weights, pl_module.model)
        self.average.place(named)
        self._follow(named)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """One update for each optimizer step, also for one left out for its gradient."""
        if trainer.global_step <= self.step:
            return
        named = dict(pl_module.model.named_parameters())
        self._follow(named)
        self.step = trainer.global_step
        self.average.update(named, step=self.step - 1, total=trainer.max_steps)

    def _follow(self, named: dict[str, nn.Parameter]) -> None:
        for name in self.average.follow(named):
            log.info("ema: %s is now %s: starts anew", name, tuple(named[name].shape))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Before Lightning copies the state: of a mapped one a process needs its pieces alone."""
        state = checkpoint["callbacks"].pop(self.state_key, None)
        if state:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """On every rank, as shards are gathered; only rank 0's has the weights."""
        weights = {
            name: weight.reshape(self.shapes.get(name, weight.shape))
            for name, weight in self.average.gathered().items()
        }
        return {"step": self.step, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whole weights on the CPU; they are placed when training starts."""
        self.step, self.average.weights = state_dict["step"], dict(state_dict["weights"])
