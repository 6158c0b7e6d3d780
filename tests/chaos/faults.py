"""What can happen to a run. `strike` does it, `settle` waits for what follows.

`settle` returns the life that goes on, or None when it has ended and the run is to be started
again. What a fault demands (an exit code, words, a refusal until it is mended) it asserts itself.
"""

import os
import random
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

from pipeline.trainer.checkpoints import step_of
from tests.chaos.lives import Life, Run, send

WATCHDOG_SECONDS = 6


class Fault:
    """first, last: steps between which it strikes. processes: of runs that it can happen to."""

    first, last = 1, 18
    processes: tuple[int, ...] = (1, 2)
    workers: tuple[int, ...] = (0, 2)
    overrides: tuple[str, ...] = ()
    needs_small_disk = False

    def __init__(self, draw: random.Random):
        self.draw = draw

    def environment(self, run: Run) -> dict[str, str]:
        return {}

    def ready(self, run: Run, life: Life) -> bool:
        """Whether it can happen now."""
        return True

    def strike(self, run: Run, life: Life) -> None:
        raise NotImplementedError

    def settle(self, run: Run, life: Life) -> Life | None:
        """Most faults end the run; all of its processes go by themselves."""
        life.wait()
        return None


class KillNode(Fault):
    """kill -9 of all processes at once, as a node that loses power."""

    def strike(self, run, life):
        life.kill()


class KillRank0(Fault):
    """kill -9 of rank 0, which started the others: these end."""

    def strike(self, run, life):
        send(life.pid, signal.SIGKILL)


class KillRank1(Fault):
    """kill -9 of rank 1: rank 0 ends."""

    processes = (2,)

    def ready(self, run, life):
        return life.rank(1) is not None

    def strike(self, run, life):
        send(life.rank(1), signal.SIGKILL)

    def settle(self, run, life):
        assert life.wait() not in (0, 2)


class KillAtStart(Fault):
    """kill -9 of rank 0 before the first step of a life: importing, meeting, reading."""

    first, last = 0, 0

    def strike(self, run, life):
        time.sleep(self.draw.uniform(0, 4 * run.processes))
        send(life.pid, signal.SIGKILL)


class KillWhileSaving(Fault):
    """kill -9 while a checkpoint is being written."""

    last = 15

    def ready(self, run, life):
        return bool(list((run.directory / "checkpoints").glob(".step-*.part")))

    def strike(self, run, life):
        life.kill()


class Preempted(Fault):
    """SIGTERM or SIGUSR1 to one rank: a checkpoint, exit code 75."""

    last = 15

    def strike(self, run, life):
        rank = life.rank(self.draw.randrange(run.processes))
        send(rank, self.draw.choice([signal.SIGTERM, signal.SIGUSR1]))

    def settle(self, run, life):
        code = life.wait()
        assert code == 75, f"exit code {code}:\n{life.said()[-2000:]}"


class StopAndGoOn(Fault):
    """SIGSTOP of a rank, SIGCONT some seconds later: the same life goes on."""

    def strike(self, run, life):
        rank = life.rank(self.draw.randrange(run.processes))
        send(rank, signal.SIGSTOP)
        time.sleep(self.draw.uniform(0.5, 3))
        send(rank, signal.SIGCONT)

    def settle(self, run, life):
        return life


class StopForGood(Fault):
    """SIGSTOP of a rank for good: the other's watchdog ends it, a scheduler takes the rest away."""

    processes = (2,)
    last = 12
    overrides = (f"callbacks.watchdog.timeout_seconds={WATCHDOG_SECONDS}",)

    def ready(self, run, life):
        return life.rank(1) is not None

    def strike(self, run, life):
        send(life.rank(self.draw.randrange(2)), signal.SIGSTOP)

    def settle(self, run, life):
        until = time.monotonic() + WATCHDOG_SECONDS + 40
        while life.running() and life.rank(1) is not None and time.monotonic() < until:
            time.sleep(0.05)
        assert time.monotonic() < until, f"nobody noticed:\n{life.said()[-2000:]}"
        assert f"no step for {WATCHDOG_SECONDS} s" in life.said(), life.said()[-2000:]
        life.kill()


class FullDisk(Fault):
    """ENOSPC: the run's disk is filled up; the run says so, and goes on once there is room."""

    last = 15
    needs_small_disk = True

    def strike(self, run, life):
        with open(run.runs_dir / "filler", "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def settle(self, run, life):
        code = life.wait()
        (run.runs_dir / "filler").unlink()
        assert code in (0, 2), f"exit code {code}:\n{life.said()[-2000:]}"
        assert code == 0 or "No space left on device" in life.said(), life.said()[-2000:]


class FileTooLarge(Fault):
    """EFBIG, as of a quota: no file may grow above a size, set while the run goes on."""

    last = 15

    def strike(self, run, life):
        resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))

    def settle(self, run, life):
        code = life.wait()
        assert code in (0, 2), f"exit code {code}:\n{life.said()[-2000:]}"
        assert code == 0 or "File too large" in life.said(), life.said()[-2000:]


class WorkerKilled(Fault):
    """kill -9 of a loader's worker: another takes its place, the same life goes on."""

    workers = (2,)
    last = 12

    def __init__(self, draw):
        super().__init__(draw)
        self.worker = 0

    def ready(self, run, life):
        ranks = [pid for pid in map(life.rank, range(run.processes)) if pid]
        workers = [pid for rank in ranks for pid in life.children(rank, "python")]
        self.worker = self.draw.choice(workers) if workers else 0
        return bool(workers)

    def strike(self, run, life):
        send(self.worker, signal.SIGKILL)

    def settle(self, run, life):
        return life


class OfShards(Fault):
    """A shard's file is changed; a start is refused by name until it is back."""

    last = 12
    words = said = ""  # of a start; of a life that notices by itself, where not the shard's name

    def __init__(self, draw):
        super().__init__(draw)
        self.name, self.copy = "", Path()

    def strike(self, run, life):
        self.copy = run.place / "shards.copy"
        shutil.copytree(run.place / "shards", self.copy)
        tars = sorted((run.place / "shards").glob("*.tar"))
        tar = self.draw.choice(tars)
        self.name = tar.name
        self.change(tar)

    def change(self, tar: Path) -> None:
        raise NotImplementedError

    def settle(self, run, life):
        until = time.monotonic() + self.draw.uniform(0.5, 3)
        while life.running() and time.monotonic() < until:
            time.sleep(0.02)
        if life.running():  # it holds the files that it has opened
            life.kill()
        code = life.process.wait()
        life.wait()
        if code == 2:
            assert (self.said or self.name) in life.said(), life.said()[-2000:]
        if run.last()[1] < 20:
            run.refused(self.name, self.words)
        shutil.rmtree(run.place / "shards")
        self.copy.rename(run.place / "shards")


class ShardGone(OfShards):
    """A shard disappears."""

    words = "is missing"

    def change(self, tar):
        tar.unlink()


class ShardReplaced(OfShards):
    """A shard is replaced by one of another size."""

    words = "the manifest says"

    def change(self, tar):
        other = tar.with_suffix(".new")
        other.write_bytes(tar.read_bytes() + bytes(10240))
        other.replace(tar)


class ShardTruncated(OfShards):
    """A shard is cut in place, under those who have it mapped: they die of SIGBUS, or notice."""

    words = "the manifest says"

    def change(self, tar):
        os.truncate(tar, tar.stat().st_size // 2)


class DataReplaced(OfShards):
    """The whole directory is replaced by as many other pairs, manifest included."""

    first = 4  # what it is compared with is in the checkpoints
    words, said = "other shards", "shards"

    def ready(self, run, life):
        return bool(run.checkpoints)

    def change(self, tar):
        self.name = "the checkpoint's data"
        shutil.rmtree(tar.parent)
        shutil.copytree(self.other, tar.parent)

    def strike(self, run, life):
        self.other = run.data / "other" / "shards"
        super().strike(run, life)


class OfFiles(Fault):
    """A crash after which a file of the run directory is damaged."""

    def strike(self, run, life):
        life.kill()

    def settle(self, run, life):
        self.damage(run)

    def damage(self, run: Run) -> None:
        raise NotImplementedError


def spoil(path: Path, draw: random.Random) -> None:
    """Wrong bits, a cut, nothing at all, or a page of zeros."""
    data, how = bytearray(path.read_bytes()), draw.randrange(4)
    at = draw.randrange(len(data) // 4, len(data) // 2)
    if how == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        data.clear()
    else:
        data[at : at + 4096] = bytes(4096)
    path.write_bytes(data)


class CheckpointDamaged(OfFiles):
    """The newest checkpoint is corrupt or cut: the one before is taken, and that is said."""

    first = 4

    def ready(self, run, life):
        return len(run.checkpoints) == 2

    def damage(self, run):
        spoilt, before = run.checkpoints[0], run.checkpoints[1]
        spoil(spoilt, self.draw)
        life = run.start()
        until = time.monotonic() + 60
        while (
            "continuing from" not in life.said() and life.running() and (time.monotonic() < until)
        ):
            time.sleep(0.05)
        said = life.said()
        assert f"{spoilt.name} is damaged" in said, said[-2000:]
        assert f"continuing from {before}" in said, said[-2000:]
        self.life = life

    def settle(self, run, life):
        self.damage(run)
        return self.life


class CheckpointsAllDamaged(OfFiles):
    """All checkpoints are corrupt: refused, nothing is begun anew; one put back, it goes on."""

    first = 4

    def ready(self, run, life):
        return bool(run.checkpoints)

    def damage(self, run):
        good = {path: path.read_bytes() for path in run.checkpoints}
        for path in good:
            spoil(path, self.draw)
        run.refused("no checkpoint is sound")
        path, data = self.draw.choice(sorted(good.items()))
        path.write_bytes(data)


class MetricsTorn(OfFiles):
    """metrics.jsonl and optimizer.txt end anywhere, as after a crash of the machine."""

    def damage(self, run):
        tail = self.draw.choice([b"", b"\0" * 300, b'{"step": 1', b"7\n", b"\xff\xfe"])
        metrics = run.directory / "metrics.jsonl"
        # rows up to a checkpoint were flushed with it
        flushed = step_of(next(iter(run.checkpoints), None))
        rows = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        whole, rest = b"".join(rows[:flushed]), b"".join(rows[flushed:])
        metrics.write_bytes(whole + rest[: self.draw.randint(0, len(rest))] + tail)
        (run.directory / "optimizer.txt").write_bytes(tail)


class ConfigTorn(OfFiles):
    """config.yaml is empty or cut: refused; removed, it is written again by the same command."""

    def damage(self, run):
        path = run.directory / "config.yaml"
        data = path.read_bytes()
        how = self.draw.randrange(3)
        path.write_bytes([b"", bytes(512), data[:-1] + b": ["][how])
        run.refused("config.yaml is damaged")
        path.unlink()


class SecondStart(Fault):
    """The same name is started while it runs: refused with the host and process that has it."""

    def strike(self, run, life):
        # held still, else it would be at its end before the other has imported torch
        for pid in life.members():
            send(pid, signal.SIGSTOP)
        run.refused("is being trained by", socket.gethostname(), f'"process": {life.pid}')
        for pid in life.members():
            send(pid, signal.SIGCONT)

    def settle(self, run, life):
        return life


class StartedTwice(Fault):
    """After a crash two jobs start at the same moment: one works, the other is refused."""

    def strike(self, run, life):
        life.kill()

    def settle(self, run, life):
        lives = [run.start(), run.start()]
        until = time.monotonic() + 60
        while all(one.running() for one in lives) and time.monotonic() < until:
            time.sleep(0.02)
        lost = next(one for one in lives if not one.running())
        assert lost.wait() == 2, lost.said()[-2000:]
        assert "is being trained by" in lost.said()
        return next(one for one in lives if one is not lost)


class ClockJumps(Fault):
    """The wall clock jumps by up to a month, either way."""

    def environment(self, run):
        clock = Path(__file__).parent / "clock"
        return {"PYTHONPATH": str(clock), "CHAOS_CLOCK": str(run.place / "clock")}

    def strike(self, run, life):
        (run.place / "clock").write_text(f"{self.draw.uniform(-3e6, 3e6):.0f}")

    def settle(self, run, life):
        return life


class WandbKilled(Fault):
    """kill -9 of W&B's own process: the run goes on without it."""

    overrides = ("tracking=default",)

    def ready(self, run, life):
        return bool(life.children(life.pid, "wandb-core"))

    def strike(self, run, life):
        for pid in life.children(life.pid, "wandb-core"):
            send(pid, signal.SIGKILL)

    def settle(self, run, life):
        return life


class WandbFolder(Fault):
    """After a crash W&B's folder can no longer be written: the run goes on without it."""

    overrides = ("tracking=default",)

    def strike(self, run, life):
        life.kill()
        folder = run.directory / "wandb"
        shutil.rmtree(folder, ignore_errors=True)
        folder.unlink(missing_ok=True)
        folder.write_text("in the way")

    def settle(self, run, life):
        return None


class WandbUnreachable(Fault):
    """W&B is asked to be online, and there is no server."""

    overrides = ("tracking=default", "tracking.wandb.mode=online")

    def environment(self, run):
        return {
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": "http://127.0.0.1:9",
        }

    def strike(self, run, life):
        assert "The run goes on offline" in life.said()

    def settle(self, run, life):
        return life


ALL: tuple[type[Fault], ...] = (
    *(KillNode, KillRank0, KillRank1, KillAtStart, KillWhileSaving, Preempted, StopAndGoOn),
    *(StopForGood, FullDisk, FileTooLarge, WorkerKilled, ShardGone, ShardReplaced),
    *(ShardTruncated, DataReplaced, CheckpointDamaged, CheckpointsAllDamaged, MetricsTorn),
    *(ConfigTorn, SecondStart, StartedTwice, ClockJumps, WandbKilled, WandbFolder),
)
SLOW = (WandbUnreachable,)  # W&B's own patience is two minutes a start
