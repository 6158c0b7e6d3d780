"""Checkpoints: written whole or not at all, the newest few kept, the newest found again."""

import errno
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from pipeline.shards import whole_file

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Temporary name, fsync, rename: a kill or a full disk leaves the checkpoint before
    untouched.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint under its name, whole. Raises ValueError when the disk is full."""
        with whole_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's archive writer hides what the disk said
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


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


def numbered(directory: Path) -> list[Path]:
    """The checkpoints of a folder, the one with the most steps first."""
    found = [
        (int(m[1]), p) for p in directory.glob("*.ckpt") if (m := re.search(r"(\d+)$", p.stem))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def find_newest(directory: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return next(iter(numbered(directory)), None)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file: None for a zip archive whose checksums are right.

    Price: reads it once. Raises ValueError when it cannot be read for another reason than damage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ENOENT, errno.EINVAL, None):
            raise ValueError(f"{path} cannot be read: {error}") from error
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # a wrong bit in a header makes zipfile raise almost anything
        return f"{type(error).__name__}: {error}"
    return None if member is None else f"{member} has a wrong checksum"


def find_sound(directory: Path, *, set_aside: bool = False) -> Path | None:
    """The newest checkpoint whose checksums are right; those passed over are named in the log.

    set_aside: rename these to NAME.damaged, so that they neither count as the newest nor push out
        a sound one.
    None where there is no checkpoint. Raises ValueError where there are some and none is sound.
    """
    candidates, damaged = numbered(directory), []
    for path in candidates:
        wrong = damage(path)
        if wrong is None:
            for other in damaged if set_aside else ():
                other.replace(other.with_name(f"{other.name}.damaged"))
            return path
        damaged.append(path)
        log.warning("%s is damaged (%s): passed over", path, wrong)
    if candidates:
        raise ValueError(
            f"{directory}: no checkpoint is sound, {', '.join(p.name for p in damaged)}: give one "
            "back from a copy, or remove them to train from the first step"
        )
    return None


def sweep(directory: Path) -> None:
    """Remove what a killed run was writing: `.NAME.part` files of a run and its checkpoints."""
    for folder in (directory, directory / "checkpoints"):
        for part in folder.glob(".*.part"):
            log.info("%s: left by a killed run, removed", part)
            part.unlink(missing_ok=True)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done in a checkpoint; 0 for none."""
    return int(re.search(r"(\d+)$", checkpoint.stem)[1]) if checkpoint is not None else 0


class Checkpoints(pl.Callback):
    """Save after every `every_steps` optimizer steps, and where training ends, be it early; keep
    the newest `keep`.
    """

    def __init__(self, *, directory: Path, every_steps: int, keep: int):
        if every_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoint_every_steps={every_steps}, keep_checkpoints={keep}: both at least 1"
            )
        self.directory, self.every_steps, self.keep = directory, every_steps, keep
        self.saved = 0  # step of the checkpoint that was written, or gone on from, last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises ValueError when ranks found other checkpoints: they would wait for each other."""
        self.saved = trainer.global_step
        if trainer.world_size == 1:
            return
        step = torch.tensor([trainer.global_step, -trainer.global_step], device=pl_module.device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX)
        last, first = int(step[0]), -int(step[1])
        if last != first:
            raise ValueError(
                f"rank {trainer.global_rank} is at step {trainer.global_step}, ranks are at "
                f"{first} to {last}: do all nodes see the same {self.directory}?"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every_steps and step != trainer.max_steps:
            return
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.saved:  # something ended the training early
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Write the step that has just ended; called on every rank."""
        path = self.path(trainer)
        for logger in trainer.loggers:
            logger.save()  # rows up to here are not written again
        trainer.save_checkpoint(path)
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            for old in sorted(self.directory.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()
            self._forget_companions()
        return path

    def path(self, trainer: pl.Trainer) -> Path:
        """The file of the step that has just ended, whether or not it is written."""
        return self.directory / f"step-{trainer.global_step:08d}.ckpt"

    def _forget_companions(self) -> None:
        """Files that an evaluation left beside checkpoints which are gone."""
        for file in self.directory.glob("step-*.geometry.safetensors"):
            if not (self.directory / f"{file.name.partition('.')[0]}.ckpt").exists():
                file.unlink()


def checkpoint_of(trainer: pl.Trainer) -> Path | None:
    """Where the step that has just ended is written, if it is."""
    return next((c.path(trainer) for c in trainer.callbacks if isinstance(c, Checkpoints)), None)


def newest_of(trainer: pl.Trainer) -> Path | None:
    """The newest checkpoint that a trainer has written or found."""
    folders = [c.directory for c in trainer.callbacks if isinstance(c, Checkpoints)]
    return next((path for path in map(find_newest, folders) if path is not None), None)
