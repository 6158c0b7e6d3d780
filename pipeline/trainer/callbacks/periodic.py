"""What callbacks share that look at the model every so many pairs and leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn


class Periodic(pl.Callback):
    """every_samples: pairs between two looks, to the next whole step; also after the last.

    For one process and DDP: elsewhere weights are in pieces, and a run is refused as it starts.
    """

    name = ""  # in conf/callbacks

    def __init__(self, every_samples: int) -> None:
        if every_samples < 1:
            raise ValueError(f"callbacks.{self.name}.every_samples={every_samples}: at least 1")
        self.every_samples = every_samples

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"callbacks.{self.name} with {type(trainer.strategy).__name__}, which keeps "
                f"weights in pieces: callbacks.{self.name}=null, and `clip-eval` on checkpoints"
            )

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> bool:
        """Whether to look after optimizer step `step`, counted from 1."""
        seen, before = (pl_module.phase.samples_at(n) for n in (step, step - 1))
        return seen // self.every_samples > before // self.every_samples or (
            step >= trainer.max_steps
        )


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Each module's training mode is afterwards what it was: an averaged tower may have its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
