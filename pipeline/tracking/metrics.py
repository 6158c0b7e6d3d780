"""metrics.jsonl: one JSON object a log step, so that a run can be read back without a server."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


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
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget rows after `step`: a run that resumes there writes them again. A torn last row
        goes too.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept))
        os.replace(part, self.path)


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """The rows of runs/N/metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
