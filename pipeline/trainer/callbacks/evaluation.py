"""Evaluation tasks while a run goes on: their numbers over samples_seen, beside the loss."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from pipeline.config import build
from pipeline.evals.remembered import Remembered
from pipeline.evals.task import Task, run_task
from pipeline.evals.trained import TrainedClip, shortened
from pipeline.trainer.checkpoints import checkpoint_of


class Evaluation(pl.Callback):
    """every_samples: pairs between two evaluations, to the next whole step; also after the last.
    tasks: by name, as in `eval` of `clip-eval`.

    Every rank embeds its share; the run's weights and random numbers are as without it. For one
    process and DDP: where weights are kept in pieces, evaluate checkpoints with `clip-eval`.
    Price: that of the tasks, each time; the rate of the run does not count it.
    """

    def __init__(self, *, every_samples: int, tasks: Mapping[str, Task]) -> None:
        if every_samples < 1 or not tasks:
            raise ValueError(
                f"callbacks.evaluation: every_samples={every_samples}, {len(tasks)} tasks: need a "
                "number above 0, and a task: +eval@callbacks.evaluation.tasks=geometry"
            )
        self.every_samples, self.tasks = every_samples, dict(tasks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"callbacks.evaluation with {type(trainer.strategy).__name__}, which keeps weights "
                "in pieces: leave it out, and evaluate checkpoints with `clip-eval run=...`"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        step, phase = trainer.global_step, pl_module.phase
        seen, before = phase.samples_at(step), phase.samples_at(step - 1)
        if seen // self.every_samples == before // self.every_samples and step < trainer.max_steps:
            return
        config, modes = phase.config, [(m, m.training) for m in pl_module.model.modules()]
        trained = TrainedClip(
            model=pl_module.model,
            tokenizer=build(config.tokenizer, **shortened(config)),
            transform=pl_module.transform,
            device=pl_module.device,
            checkpoint=checkpoint_of(trainer),  # to be written at this step, or not
        )
        embedder = Remembered(trained)
        row: dict[str, float] = {"samples_seen": seen}
        for name, task in self.tasks.items():
            row |= {key: float(value) for key, value in run_task(name, task, embedder).items()}
        for module, mode in modes:  # one by one: an averaged tower may have its own
            module.training = mode
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
