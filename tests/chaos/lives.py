"""A real training run in a folder of its own, the processes that live for it, and what they did."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.tokenizer import train_bpe
from pipeline.shards import Record, content_uid, write_manifest, write_shard
from tests.chaos import seen
from tests.conftest import picture

ROOT = Path(__file__).resolve().parents[2]
SHARDS, PAIRS_OF_A_SHARD = 8, 60
STEPS, BATCH = 20, 32
PATIENCE_SECONDS = 90.0


def make_data(folder: Path, *, first: int = 0) -> Path:
    """`shards` of 480 pairs, so that 20 steps of 32 reach into a second epoch, and a tokenizer."""
    entries, captions = [], []
    for number in range(SHARDS):
        made = []
        for n in range(first + number * PAIRS_OF_A_SHARD, first + (number + 1) * PAIRS_OF_A_SHARD):
            image, caption = picture(n), f"thing number {n}"
            uid = content_uid(image, caption)
            made.append(Record(uid, image, "png", caption, {"uid": uid}))
            captions.append(caption)
        entries.append(write_shard(folder / "shards", f"shard-{number:06d}", made))
    step = {"name": "ingest", "read": len(captions), "kept": len(captions), "dropped": {}}
    manifest = {"num_samples": len(captions), "shards": entries, "steps": [step]}
    write_manifest(folder / "shards", manifest)
    train_bpe(captions, vocab_size=600, directory=folder / "tokenizer")
    return folder


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def environ(pid: int) -> str:
    """The environment that a process began with."""
    try:
        return Path(f"/proc/{pid}/environ").read_text()
    except OSError:
        return ""


def program(pid: int) -> str:
    """The file name of what a process runs."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].rpartition("/")[2]
    except OSError:
        return ""


class Life:
    """A started command and its processes: a session of their own."""

    def __init__(self, process: subprocess.Popen, errors: Path):
        self.process, self.errors = process, errors
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def members(self) -> list[int]:
        """Processes of the session that are not dead."""
        found = []
        for name in os.listdir("/proc"):
            fields = stat(int(name)) if name.isdigit() else []
            if fields and fields[3] == str(self.pid) and fields[0] not in "ZX":
                found.append(int(name))
        return found

    def rank(self, number: int) -> int | None:
        """The process of a rank."""
        if number == 0:
            return self.pid
        word = f"LOCAL_RANK={number}\0"
        children = [p for p in self.members() if stat(p)[1:2] == [str(self.pid)]]
        return next((p for p in children if word in environ(p)), None)

    def children(self, of: int, name: str) -> list[int]:
        """Children of a process whose command begins with a program of this name; no ranks."""
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if stat(pid)[1:2] == [str(of)] and pid != self.rank(1) and name in program(pid)
        ]

    def kill(self) -> None:
        """As a node that loses power."""
        for pid in self.members():
            send(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit code, once all of its processes are gone by themselves."""
        until = time.monotonic() + seconds
        while (self.running() or self.members()) and time.monotonic() < until:
            time.sleep(0.02)
        left = self.members()
        if left:
            words = self.said()[-2000:]
            self.kill()
            raise AssertionError(f"{len(left)} processes still there after {seconds} s:\n{words}")
        return self.process.wait()

    def said(self) -> str:
        return self.errors.read_text(errors="replace")


def send(pid: int, number: int) -> None:
    """A signal, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@dataclass
class Run:
    """One name, and everything around it: its copy of the data, its log of pairs seen."""

    place: Path
    data: Path
    processes: int = 1
    workers: int = 0
    runs_dir: Path | None = None
    overrides: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    lives: int = 0

    def __post_init__(self):
        self.place.mkdir(parents=True)
        shutil.copytree(self.data / "shards", self.place / "shards")
        self.runs_dir = self.runs_dir or self.place / "runs"

    @property
    def directory(self) -> Path:
        return self.runs_dir / "chaos"

    @property
    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return sorted((self.directory / "checkpoints").glob("*.ckpt"), reverse=True)

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "pipeline.train", "recipe=emoji", "debug=tiny", "name=chaos"),
            f"runs_dir={self.runs_dir}",
            f"data.shards={self.place}/shards",
            f"tokenizer.path={self.data}/tokenizer",
            "model.text.vocab_size=600",
            f"data.workers={self.workers}",
            "data.window_shards=1",
            "checkpoint_every_steps=3",
            f"trainer.devices={self.processes}",
            f"micro_batch_size={7 if self.processes == 2 else 20}",
            "allow_foreign_targets=true",
            "+callbacks.seen._target_=tests.chaos.seen.SeenPairs",
            f"+callbacks.seen.directory={self.place}",
            "+callbacks.seen.pause_seconds=0.05",
            *self.overrides,
        ]

    def start(self) -> Life:
        self.lives += 1
        errors = self.place / f"stderr-{self.lives}.txt"
        base = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        with open(errors, "wb") as file:
            process = subprocess.Popen(
                self.command(),
                cwd=ROOT,
                env=base | self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
        return Life(process, errors)

    def refused(self, *words: str) -> None:
        """A start now ends with code 2 and these words."""
        life = self.start()
        code = life.wait()
        assert code == 2, f"exit code {code}:\n{life.said()[-2000:]}"
        assert all(word in life.said() for word in words), f"{words} not in:\n{life.said()[-2000:]}"
        assert "Traceback" not in life.said()

    def last(self) -> tuple[int, int]:
        """(process, step) of rank 0's newest row; (0, 0) before the first."""
        path = self.place / "seen-0.jsonl"
        if not path.exists() or not path.stat().st_size:
            return 0, 0
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            row = json.loads(file.read().splitlines()[-1])
        return row["life"], row["step"]

    def pairs(self) -> list[str]:
        return seen.pairs(self.place, self.processes)
