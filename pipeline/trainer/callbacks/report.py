"""report.html while a run goes on, and at its end."""

import logging
import time
from typing import Any

import lightning.pytorch as pl

from pipeline.tracking.page import write_page

log = logging.getLogger(__name__)


class Report(pl.Callback):
    """every_seconds: at most so often, beside a row of metrics; a page takes about a second.

    A page that cannot be written is said, and nothing more.
    """

    def __init__(self, *, every_seconds: float = 120.0) -> None:
        if every_seconds <= 0:
            raise ValueError(f"callbacks.report.every_seconds={every_seconds}: above 0")
        self.every_seconds = every_seconds
        self.last = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self.last >= self.every_seconds:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        self.last = time.monotonic()
        if not trainer.is_global_zero:
            return
        try:
            write_page(trainer.default_root_dir)
        except (OSError, ValueError, KeyError) as error:
            log.warning("report.html is not written: %s", error)
