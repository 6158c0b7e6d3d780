"""No step for too long: say where every thread stands, and end, so that a scheduler can restart."""

import faulthandler
import os
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

HUNG = 70  # EX_SOFTWARE of sysexits.h
GRACE_SECONDS = 5  # between the stacks and the end, for the other ranks to write theirs


class Watchdog(pl.Callback):
    """timeout_seconds: without a finished step (or checkpoint), after which a process gives up.

    Every rank has one. The stacks of all its threads go to stderr and to
    <run>/stacks-rank<R>.txt; five seconds later the process ends with code 70. What is counted are
    the watchdog's own seconds: a process that was stopped (SIGSTOP, a suspended machine) does not
    find itself hanging, and a clock that jumps changes nothing. Longer than any compilation, first
    read of the data or evaluation; null switches it off.
    """

    def __init__(self, *, timeout_seconds: float | None = 1800.0) -> None:
        if timeout_seconds is not None and timeout_seconds <= 0:
            raise ValueError(
                f"callbacks.watchdog.timeout_seconds={timeout_seconds}: above 0, or null for none"
            )
        self.timeout_seconds = timeout_seconds
        self.idle = 0.0
        self.ended = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.timeout_seconds is None:
            return
        path = Path(trainer.default_root_dir) / f"stacks-rank{trainer.global_rank}.txt"
        self.ended.clear()
        watch = threading.Thread(target=self._watch, args=(path,), daemon=True, name="watchdog")
        watch.start()

    def _watch(self, path: Path) -> None:
        tick = min(1.0, self.timeout_seconds / 4)
        while not self.ended.wait(tick):
            self.idle += tick
            if self.idle < self.timeout_seconds:
                continue
            words = (
                f"watchdog: no step for {self.timeout_seconds:g} s "
                f"(callbacks.watchdog.timeout_seconds); stacks in {path}"
            )
            print(words, file=sys.stderr, flush=True)
            with open(path, "w") as file:
                file.write(f"{words}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            faulthandler.dump_traceback()
            self.ended.wait(GRACE_SECONDS)
            os._exit(HUNG)  # a hanging collective cannot be interrupted

    def on_train_batch_end(self, *_: Any) -> None:
        self.idle = 0.0

    def on_save_checkpoint(self, *_: Any) -> None:
        self.idle = 0.0

    def teardown(self, *_: Any, **__: Any) -> None:
        self.ended.set()
