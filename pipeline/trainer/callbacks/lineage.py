"""W&B's lineage of a run: it uses its datasets, and its last checkpoint is an artifact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from pipeline.tracking.lineage import checkpoint_artifact, dataset_artifact, used
from pipeline.tracking.wandb import SteadyWandb
from pipeline.trainer.checkpoints import newest_of


class Lineage(pl.Callback):
    """Nothing without W&B. Datasets are directories of ours, which have a manifest.

    Price: reads the last checkpoint once, after training. `wandb sync` sends manifests, no weights.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for directory in datasets(pl_module.phase.config):
            _in_wandb(trainer, lambda run, d=directory: used(run, dataset_artifact(d)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = newest_of(trainer)
        if path is None or not trainer.is_global_zero:
            return
        name = Path(trainer.default_root_dir).resolve().name
        metadata = {
            "step": trainer.global_step,
            "samples_seen": pl_module.phase.samples_at(trainer.global_step),
        }
        _in_wandb(trainer, lambda run: run.log_artifact(checkpoint_artifact(name, path, metadata)))


def datasets(config: DictConfig) -> list[Path]:
    """The directories of ours that a phase reads."""
    one = OmegaConf.select(config, "data.shards")
    several = OmegaConf.select(config, "data.mixture") or []
    places = [Path(str(place)) for place in [one, *[part.shards for part in several]] if place]
    return [place for place in places if (place / "manifest.json").is_file()]


def _in_wandb(trainer: pl.Trainer, do: Callable[[Any], Any]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, SteadyWandb) and trainer.is_global_zero:
            with logger.steady():
                do(logger.experiment)
