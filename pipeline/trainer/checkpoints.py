"""Checkpoints: written whole or not at all, the newest few kept, the newest found again."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename: a kill or a full disk leaves the checkpoint before
    untouched.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint under its name, whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def has_shape(key: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state has its parameter's shape; torch's `step` counts."""
    return isinstance(value, Tensor) and key != "step"


def check_names(held: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Raises ValueError unless a checkpoint's weights are those of the model."""
    if whole.keys() != held.keys():
        raise ValueError(
            f"the checkpoint is of another model: it lacks {sorted(held.keys() - whole.keys())} "
            f"and has {sorted(whole.keys() - held.keys())}"
        )


def find_newest(directory: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    found = [
        (int(m[1]), p) for p in directory.glob("*.ckpt") if (m := re.search(r"(\d+)$", p.stem))
    ]
    return max(found)[1] if found else None


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done in a checkpoint; 0 for none."""
    return int(re.search(r"(\d+)$", checkpoint.stem)[1]) if checkpoint is not None else 0


class Checkpoints(pl.Callback):
    """Save after every `every_steps` optimizer steps and after the last; keep the newest `keep`."""

    def __init__(self, *, directory: Path, every_steps: int, keep: int):
        if every_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoint_every_steps={every_steps}, keep_checkpoints={keep}: both at least 1"
            )
        self.directory, self.every_steps, self.keep = directory, every_steps, keep

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every_steps and step != trainer.max_steps:
            return
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Write the step that has just ended; called on every rank."""
        path = self.directory / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in sorted(self.directory.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()
        return path


def newest_of(trainer: pl.Trainer) -> Path | None:
    """The newest checkpoint that a trainer has written or found."""
    folders = [c.directory for c in trainer.callbacks if isinstance(c, Checkpoints)]
    return next((path for path in map(find_newest, folders) if path is not None), None)
