"""A signal before the end of the allocation: finish the step, write a checkpoint, leave."""

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from pipeline.trainer.checkpoints import Checkpoints

log = logging.getLogger(__name__)

TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class Flag:
    """Whether any rank has raised it, on its way from the device.

    A step later it has arrived; at once, whoever asks waits for all that the device has to do.
    """

    def __init__(self, host: torch.Tensor, arrived: torch.cuda.Event | None) -> None:
        self.host, self.arrived = host, arrived

    @classmethod
    def of_all_ranks(cls, own: bool, device: torch.device) -> "Flag":
        flag = torch.full((1,), float(own), device=device)  # torch.tensor would wait for its copy
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if device.type != "cuda":
            return cls(flag, None)
        host, arrived = torch.empty(1, pin_memory=True), torch.cuda.Event()
        host.copy_(flag, non_blocking=True)
        arrived.record()
        return cls(host, arrived)

    def raised(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.host.item())


class Preemption(pl.Callback):
    """signals: names that end the run early, e.g. SLURM's --signal=USR1@300 and its TERM.

    A signal to one process is enough: the ranks agree after each step on the signals of the step
    before, so that none waits for its device. What remains of the step, with several processes one
    more, and one checkpoint's writing is the time it takes; then all processes end, rank 0 with
    code 75, and the same command continues to the same bits. Before the first step a signal ends
    the process as ever.
    Price: one all-reduce of a number a step.
    """

    def __init__(self, *, signals: Sequence[str] = ("USR1", "TERM")) -> None:
        unknown = [name for name in signals if not hasattr(signal, f"SIG{name}")]
        if unknown:
            raise ValueError(
                f"callbacks.preemption.signals: {unknown} is no signal: give e.g. [USR1, TERM]"
            )
        self.signals = [getattr(signal, f"SIG{name}") for name in signals]
        self.received: str | None = None
        self.pending: Flag | None = None
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over: Lightning's own handler communicates in the middle of a step."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Raises SystemExit on all ranks, once one has got a signal; rank 0 with code 75."""
        if not self._asked(trainer, pl_module.device):
            return
        checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
        path = checkpoints.save(trainer)
        if trainer.is_global_zero:
            log.warning(
                "%s: stopped after step %d, %s is written; the same command goes on (exit code %d)",
                self.received or "a signal to another rank",
                trainer.global_step,
                path,
                TEMPORARY_FAILURE,
            )
        # not every rank: srun --kill-on-bad-exit would end those that are not yet done
        raise SystemExit(TEMPORARY_FAILURE if trainer.is_global_zero else 0)

    def _asked(self, trainer: pl.Trainer, device: torch.device) -> bool:
        """Whether this process has got a signal; of several, whether one had by the end of the step
        before, or of this one where it is the last.
        """
        if trainer.world_size == 1:
            return self.received is not None
        before, self.pending = self.pending, Flag.of_all_ranks(self.received is not None, device)
        last = trainer.global_step >= trainer.max_steps
        return (before is not None and before.raised()) or (last and self.pending.raised())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
