"""Evaluation tasks while a run goes on: their numbers over samples_seen, beside the loss."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from pipeline.config import build
from pipeline.evals.remembered import Remembered
from pipeline.evals.task import Task, run_task
from pipeline.evals.trained import TrainedClip, shortened
from pipeline.trainer.callbacks.periodic import Periodic, modes_restored
from pipeline.trainer.checkpoints import checkpoint_of


class Evaluation(Periodic):
    """every_samples: see Periodic.  tasks: by name, as in `eval` of `clip-eval`.

    Every rank embeds its share; the run's weights and random numbers are as without it. For one
    process and DDP: where weights are kept in pieces, evaluate checkpoints with `clip-eval`.
    Price: that of the tasks, each time; the rate of the run does not count it.
    """

    name = "evaluation"

    def __init__(self, *, every_samples: int, tasks: Mapping[str, Task]) -> None:
        super().__init__(every_samples)
        if not tasks:
            raise ValueError(
                "callbacks.evaluation.tasks: 0 tasks: add one, "
                "+eval@callbacks.evaluation.tasks=geometry"
            )
        self.tasks = dict(tasks)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        step, phase = trainer.global_step, pl_module.phase
        if not self.due(trainer, pl_module, step):
            return
        row: dict[str, float] = {"samples_seen": phase.samples_at(step)}
        with modes_restored(pl_module.model):
            row |= self._numbers(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def _numbers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        config = pl_module.phase.config
        trained = TrainedClip(
            model=pl_module.model,
            tokenizer=build(config.tokenizer, **shortened(config)),
            transform=pl_module.transform,
            device=pl_module.device,
            checkpoint=checkpoint_of(trainer),  # to be written at this step, or not
        )
        embedder = Remembered(trained)
        found: dict[str, float] = {}
        for name, task in self.tasks.items():
            found |= {key: float(value) for key, value in run_task(name, task, embedder).items()}
        return found
