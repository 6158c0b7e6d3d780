"""A run under faults, beside the same run undisturbed: what was lost, repeated, and how long."""

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.tracking.metrics import read_metrics
from tests.chaos.faults import Fault
from tests.chaos.lives import BATCH, PAIRS_OF_A_SHARD, SHARDS, STEPS, Life, Run
from tests.chaos.seen import lost_and_repeated

TIMED = "perf/"  # of a row, what may differ
DISK_MIB = 64


@dataclass
class Struck:
    """A fault that happened: at which step, and seconds until the run was past the last step done
    before it ended or went on.
    """

    kind: str
    at: int
    since: float
    past: int = 0
    seconds: float | None = None


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, small enough to be filled. Raises CalledProcessError without
    root.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def losses(run: Run) -> list[dict]:
    """metrics.jsonl without what measures time."""
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMED)}
        for row in read_metrics(run.directory)
    ]


def weights(run: Run) -> dict:
    newest = run.checkpoints[0]
    return torch.load(newest, weights_only=True)["state_dict"]


class Disturbed:
    """faults: happen in this order, at steps drawn by `draw`."""

    def __init__(self, run: Run, faults: Sequence[Fault], draw: random.Random):
        self.run, self.faults, self.draw = run, faults, draw
        self.struck: list[Struck] = []
        for fault in faults:
            run.overrides += [word for word in fault.overrides if word not in run.overrides]
            run.env |= fault.environment(run)

    def look(self) -> int:
        """The newest step of any life; faults that it is past are over."""
        _, step = self.run.last()
        for one in self.struck:
            if one.seconds is None and step > one.past:
                one.seconds = time.monotonic() - one.since
        return step

    def until(self, life: Life, target: int, fault: Fault) -> bool:
        """Wait until this life has done `target` steps and the fault is ready; False if it ends."""
        end = time.monotonic() + 180
        while life.running():
            pid, step = self.run.last()
            self.look()
            if (pid == life.pid or target == 0) and step >= target and fault.ready(self.run, life):
                return True
            time.sleep(0.002)
            assert time.monotonic() < end, f"no step {target}:\n{life.said()[-2000:]}"
        return False

    def go(self) -> None:
        """All faults, and then to the end."""
        self.live()
        for one in self.struck:  # at the last step, or nobody looked any more
            one.seconds = one.seconds or time.monotonic() - one.since

    def live(self) -> None:
        """Strike and start again; a run that is at its end before a fault's step is done."""
        targets = sorted(self.draw.randint(fault.first, fault.last) for fault in self.faults)
        life: Life | None = None
        for fault, target in zip(self.faults, targets, strict=True):
            if life is not None and fault.last == 0:
                life.kill()  # what strikes at a start needs one
                life = None
            life = life or self.run.start()
            target = min(max(target, fault.first), fault.last)
            while not self.until(life, target, fault):
                code = life.wait()
                assert code == 0, f"{fault}: exit code {code}:\n{life.said()[-2000:]}"
                return
            time.sleep(self.draw.uniform(0, 0.1))
            life = self.strike(fault, life)
        life = life or self.run.start()
        while life.running():
            self.look()
            time.sleep(0.01)
        code = life.wait()
        assert code == 0, f"exit code {code}:\n{life.said()[-2000:]}"

    def strike(self, fault: Fault, life: Life) -> Life | None:
        """One fault and what follows; gives the life that goes on, if one does."""
        one = Struck(type(fault).__name__, self.run.last()[1], time.monotonic())
        fault.strike(self.run, life)
        left = fault.settle(self.run, life)
        one.past = self.run.last()[1]  # a run may go some steps before it notices
        self.struck.append(one)
        return left


@dataclass
class Verdict:
    """What became of a run: `seconds` are those more than undisturbed."""

    struck: list[Struck]
    same_losses: bool
    same_weights: bool
    lost: int
    repeated: int
    left_behind: list[str]
    lives: int
    seconds: float

    def good(self) -> bool:
        exact = self.same_losses and self.same_weights
        return exact and not (self.lost or self.repeated or self.left_behind)


@dataclass
class Undisturbed:
    """The same run to its end: what others are compared with."""

    run: Run
    seconds: float = 0.0
    pairs: list[str] = field(default_factory=list)

    def __post_init__(self):
        began = time.monotonic()
        life = self.run.start()
        assert life.wait() == 0, life.said()
        self.seconds, self.pairs = time.monotonic() - began, self.run.pairs()
        # an epoch holds each pair once; the run reaches into the second
        pool = SHARDS * PAIRS_OF_A_SHARD
        assert len(self.pairs) == STEPS * BATCH
        assert len(set(self.pairs[:pool])) == pool
        assert len(set(self.pairs[pool:])) == STEPS * BATCH - pool


def disturb(run: Run, faults: Sequence[Fault], draw: random.Random, whole: Undisturbed) -> Verdict:
    """Let faults happen to a run, and compare it with the undisturbed one."""
    disturbed, began = Disturbed(run, faults, draw), time.monotonic()
    disturbed.go()
    seconds = time.monotonic() - began - whole.seconds
    ours, theirs = weights(run), weights(whole.run)
    lost, repeated = lost_and_repeated(run.pairs(), whole.pairs)
    return Verdict(
        struck=disturbed.struck,
        same_losses=losses(run) == losses(whole.run) and run.pairs() == whole.pairs,
        same_weights=ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in theirs),
        lost=lost,
        repeated=repeated,
        left_behind=[str(p) for p in run.directory.rglob(".*.part")],
        lives=run.lives,
        seconds=seconds,
    )
