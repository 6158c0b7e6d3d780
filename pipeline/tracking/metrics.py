"""metrics.jsonl: one JSON object a log step, so that a run can be read back without a server."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from pipeline.shards import FULL, write_atomically


class MetricsFile(Logger):
    """directory: the run's folder. Keys are those of the dashboard."""

    def __init__(self, *, directory: str):
        super().__init__()
        self.path = Path(directory) / "metrics.jsonl"

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The config is beside it, in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ValueError(
                f"{self.path}: {error.strerror}. Nothing finished is lost: make room on that disk, "
                "then the same command goes on"
            ) from error

    @rank_zero_only
    def save(self) -> None:
        """Put the rows on the disk, as a checkpoint is: a crash of the machine keeps them."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget rows after `step`: a run that resumes there writes them again. A torn last row
        goes too.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("step", step + 1) <= step:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """The rows of runs/N/metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
