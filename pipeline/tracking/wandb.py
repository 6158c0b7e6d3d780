"""Weights & Biases: the run's name is its id, so a resumed run continues its curves. Offline by
default, and never a reason for a run to end.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

MODES = ("offline", "online")


class SteadyWandb(WandbLogger):
    """W&B's logger, whose failures are a warning: the run goes on without it from there.

    Nothing is lost of what it would have shown: each row is in metrics.jsonl too.
    """

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Anything that W&B raises within ends W&B, not the run."""
        try:
            yield
        except Exception as error:  # a full disk, its process killed, a server's answer
            log.warning(
                "W&B: %s: %s. The run goes on without it; metrics.jsonl has every row",
                type(error).__name__,
                error,
            )
            self._experiment = wandb.init(mode="disabled")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.steady():
            super().log_metrics(metrics, step)

    def picture(self, key: str, path: Path, samples_seen: int) -> None:
        """A file with a picture, at its place on the axis."""
        with self.steady():
            row = {key: wandb.Image(str(path)), "samples_seen": samples_seen}
            self.experiment.log(row)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        with self.steady():
            super().log_hyperparams(params)

    def finalize(self, status: str) -> None:
        with self.steady():
            super().finalize(status)


def wandb_logger(
    *, name: str, directory: str, project: str = "pairwright", mode: str = "offline"
) -> SteadyWandb:
    """mode: offline writes below `directory` only (`wandb sync` sends it later); online needs a
    login.

    A server that cannot be reached makes it offline (after W&B's own patience, some two minutes); a
    folder that cannot be written, nothing at all: both are said once, and the run goes on.
    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"tracking.wandb.mode={mode}: modes are {', '.join(MODES)}")
    Path(directory).mkdir(parents=True, exist_ok=True)
    if mode == "online":
        try:
            return begun(name, directory, project, offline=False)
        except Exception as error:  # no network, no login, a refusal: W&B has many errors for it
            log.warning(
                "W&B: %s: %s. The run goes on offline; send it later with `wandb sync %s/wandb/*`",
                type(error).__name__,
                error,
                directory,
            )
            wandb.teardown()  # else its process still has a run of this name
    return begun(name, directory, project, offline=True)


def begun(name: str, directory: str, project: str, *, offline: bool) -> SteadyWandb:
    """A logger whose run has begun; an online one raises what W&B raises."""
    logger = SteadyWandb(project=project, name=name, id=name, save_dir=directory, offline=offline)
    if not offline:
        _ = logger.experiment
    with logger.steady():
        logger.experiment.define_metric("samples_seen")
        logger.experiment.define_metric("*", step_metric="samples_seen")
    return logger
