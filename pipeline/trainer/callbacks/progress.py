"""A progress bar in pairs: rate, time left, loss."""

from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm


class PairsProgress(pl.Callback):
    """first_step: of the optimizer, where the bar begins. On rank 0 only."""

    def __init__(self, *, first_step: int, global_batch_size: int, name: str = "train"):
        self.first_step, self.global_batch_size = first_step, global_batch_size
        self.name = name
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            done, steps = (s - self.first_step for s in (trainer.global_step, trainer.max_steps))
            self.bar = tqdm(
                total=steps * self.global_batch_size,
                initial=done * self.global_batch_size,
                unit="pair",
                unit_scale=True,
                desc=self.name,
                mininterval=0.5,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if self.bar is None:
            return
        self.bar.update(self.global_batch_size)
        if trainer.global_step % 10 == 0 and pl_module.last_logged:
            self.bar.set_postfix(loss=f"{pl_module.last_logged['train/loss']:.3f}", refresh=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
