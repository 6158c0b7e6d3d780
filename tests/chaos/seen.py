"""Which pairs a step really saw: a callback writes them down, and what that says about a run."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class SeenPairs(pl.Callback):
    """One row a step and rank, written at once: {"life", "step", "first", "uids"}.

    directory: not the run's, whose disk may be full. pause_seconds: before each step, so that
    faults meet a run that is at work.
    """

    def __init__(self, *, directory: str, pause_seconds: float = 0.0):
        self.directory, self.pause_seconds = Path(directory), pause_seconds

    # Before the step: at its end another callback may leave (preemption). A row of a step that was
    # not finished is taken back by the life that does it again.
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        row = {
            "life": os.getpid(),
            "step": trainer.global_step + 1,
            "first": batch["first"],
            "uids": batch["uids"],
        }
        path = self.directory / f"seen-{trainer.global_rank}.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, json.dumps(row).encode() + b"\n")
        os.close(file)
        time.sleep(self.pause_seconds)


def rows(directory: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank has seen, in order, over all lives of the run."""
    path = directory / f"seen-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line(directory: Path, rank: int) -> list[dict[str, Any]]:
    """The steps that count: a life that begins at step n takes back what was done from there.

    Raises AssertionError when a life leaves a gap.
    """
    steps, life = [], None
    for row in rows(directory, rank):
        if row["life"] != life:
            assert row["step"] <= len(steps) + 1, f"steps {len(steps) + 1} to {row['step']} missing"
            del steps[row["step"] - 1 :]
            life = row["life"]
        assert row["step"] == len(steps) + 1, f"step {row['step']} follows {len(steps)}"
        steps.append(row)
    return steps


def pairs(directory: Path, world_size: int) -> list[str]:
    """The uids of a run's line, in the order of their places."""
    ranks = [line(directory, rank) for rank in range(world_size)]
    assert len({len(steps) for steps in ranks}) == 1, [len(steps) for steps in ranks]
    found, place = [], 0
    for rows_of_step in zip(*ranks, strict=True):
        for row in rows_of_step:
            # `first` is the global batch's; ranks follow each other in it
            assert row["first"] == place, f"{row['first']} at place {place}"
            found += row["uids"]
        place = len(found)
    return found


def lost_and_repeated(found: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """Pairs of an undisturbed run that this one did not see, and that it saw once too often."""
    return (Counter(wanted) - Counter(found)).total(), (Counter(found) - Counter(wanted)).total()
