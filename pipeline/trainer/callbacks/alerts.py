"""What should wake somebody: loss spikes, skipped steps, a slow run, a scale at its bound."""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)


class Alerts(pl.Callback):
    """Watches the logged rows of metrics; each new one is looked at once.

    window: rows that the next one is compared with; nothing is said before half of them are there.
    loss_deviations: a loss so many median absolute deviations above the window's median is a spike.
    throughput_drop: fraction below the window's median of pairs per second.
    An alert is a line of alerts.jsonl in the run directory, a warning in the log, and, online, one
    of W&B's. The same one is said again only after `window` rows.
    """

    def __init__(
        self, *, window: int = 50, loss_deviations: float = 8.0, throughput_drop: float = 0.2
    ) -> None:
        if window < 4 or loss_deviations <= 0 or not 0 < throughput_drop < 1:
            raise ValueError(
                f"callbacks.alerts: window={window} (at least 4), loss_deviations="
                f"{loss_deviations} (above 0), throughput_drop={throughput_drop} (between 0 and 1)"
            )
        self.window = window
        self.loss_deviations, self.throughput_drop = loss_deviations, throughput_drop
        self.losses: deque[float] = deque(maxlen=window)
        self.rates: deque[float] = deque(maxlen=window)
        self.looked_at = -1.0
        self.rows = 0
        self.skipped = 0.0
        self.said: dict[str, int] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        row = pl_module.last_logged
        if not trainer.is_global_zero or not row or row["samples_seen"] == self.looked_at:
            return
        self.looked_at = row["samples_seen"]
        highest = max((math.exp(bound[2]) for bound in scale_bounds(pl_module)), default=math.inf)
        for title, text in self.look(row, highest):
            self._say(trainer, title, text)

    def look(self, row: Mapping[str, float], highest_scale: float) -> list[tuple[str, str]]:
        """(title, text) of what is new in a row of metrics."""
        self.rows += 1
        loss, rate = row.get("train/loss", math.nan), row.get("perf/pairs_per_second", math.nan)
        skipped, scale = row.get("train/skipped_steps", 0.0), row.get("train/logit_scale", 0.0)
        found = []
        if not math.isfinite(loss):
            found.append(("loss is not finite", f"train/loss is {loss}"))
        elif len(self.losses) >= self.window // 2:
            middle = statistics.median(self.losses)
            spread = statistics.median(abs(value - middle) for value in self.losses)
            # a thousandth: a loss that has hardly moved has no spread
            limit = middle + self.loss_deviations * max(spread, 1e-3 * abs(middle))
            if loss > limit:
                found.append(("loss spike", f"{loss:.4g}, median {middle:.4g}, limit {limit:.4g}"))
        if skipped > self.skipped:
            found.append(("steps skipped", f"{skipped - self.skipped:.0f} without a gradient"))
        if len(self.rates) >= self.window // 2:
            usual = statistics.median(self.rates)
            if rate < (1 - self.throughput_drop) * usual:
                found.append(("slow", f"{rate:,.0f} pairs per second, median {usual:,.0f}"))
        if scale >= 0.999 * highest_scale:
            found.append(
                ("logit scale at its bound", f"{scale:.1f} of at most {highest_scale:.1f}")
            )
        self.skipped = skipped
        if math.isfinite(loss):
            self.losses.append(loss)
        if math.isfinite(rate):
            self.rates.append(rate)
        return [(title, text) for title, text in found if self._is_new(title)]

    def _is_new(self, title: str) -> bool:
        before = self.said.get(title)
        if before is not None and self.rows - before < self.window:
            return False
        self.said[title] = self.rows
        return True

    def _say(self, trainer: pl.Trainer, title: str, text: str) -> None:
        log.warning("alert after %s pairs: %s: %s", f"{self.looked_at:,.0f}", title, text)
        row = {"samples_seen": self.looked_at, "title": title, "text": text}
        try:
            with open(Path(trainer.default_root_dir) / "alerts.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            log.warning("alerts.jsonl: %s", error)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                with logger.steady():
                    logger.experiment.alert(title=title, text=text)


def scale_bounds(pl_module: pl.LightningModule) -> list[tuple[Any, float, float]]:
    """(parameter, lowest, highest) of the log of the logit scale, as the model clamps it."""
    return list(pl_module.model.bounds())
