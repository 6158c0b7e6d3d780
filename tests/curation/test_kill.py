"""Killed with -9 anywhere, or out of disk space: the same command goes on to the same bytes."""

import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.run import run
from pipeline.check import composed

KILLS = 50
STAGES = ("ingest", "annotate", "select", "pack")
ANNOTATORS = ("hashes", "entries")
SELECTORS = ("caption_frequency", "duplicates", "balance")
POINTS = (
    "ingest",
    "annotate",
    "annotate",
    "select",
    "select",
    "pack",
    "pack",
    "pack",
)  # of one round
# Runs a curation in a process group of its own for each line it reads; it has imported everything
# already, so that 50 kills cost 50 times the work that was lost, not 50 times torch's import.
STARTER = """
import json, os, sys, traceback
from curation.run import run
from pipeline.check import composed
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            run(composed("curate", json.loads(line)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def digests(folder):
    """sha256 by file; without the commit in the manifest, which may change while a test runs."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
    if "manifest.json" in found:
        manifest = json.loads(found["manifest.json"])
        del manifest["created_by_commit"]
        found["manifest.json"] = json.dumps(manifest).encode()
    left = {p.name: "a folder" for p in folder.iterdir() if p.is_dir()}
    return left | {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


class Runs:
    """Starts curations of one pool, tells how far they are, and kills them."""

    def __init__(self, root: Path, pool: Path, place: Path, options: list[str]):
        self.pool, self.place, self.options = pool, place, options
        self.out, self.cache = place / "out", place / "cache"
        with open(place / "errors.txt", "w") as errors:
            self.starter = subprocess.Popen(
                [sys.executable, "-c", STARTER],
                cwd=root,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def start(self, workers: int) -> int:
        """The process (and group) id of a new run."""
        given = [f"pool={self.pool}", f"out={self.out}", f"cache={self.cache}", *self.options]
        given.append(f"engine.workers={workers}")
        self.starter.stdin.write(json.dumps(given).encode() + b"\n")
        self.starter.stdin.flush()
        return int(self.starter.stdout.readline())

    def ended(self, seconds: float) -> int | None:
        """The exit code if the run ends within so many seconds."""
        ready, _, _ = select.select([self.starter.stdout], [], [], max(seconds, 0))
        return int(self.starter.stdout.readline()) if ready else None

    def kill(self, group: int) -> None:
        os.killpg(group, signal.SIGKILL)
        assert self.ended(60) == -signal.SIGKILL

    def stage(self) -> str:
        """What is being done: the first stage that has not left all its files."""
        files = len(list(self.pool.glob("*.parquet")))
        if len(list(self.cache.glob("ingest-*/*/counts.json"))) < files:
            return "ingest"
        units = sum(
            -(-json.loads(path.read_text())["kept"] // 1024)
            for path in self.cache.glob("ingest-*/*/counts.json")
        )
        for name in ANNOTATORS:
            if len(list(self.cache.glob(f"{name}-*/*/[0-9]*.parquet"))) < units:
                return "annotate"
        if not list(self.cache.glob("select-*/steps.json")):
            return "select"
        return "done" if (self.out / "manifest.json").exists() else "pack"

    def forget(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def close(self) -> None:
        self.starter.stdin.close()
        self.starter.wait(60)


@pytest.fixture
def runs(root, tmp_path):
    """Runs over the sample pool: hashes, entries; duplicates, caption frequency, balance."""
    pool = root / "examples" / "emoji" / "pool"
    captions = [
        caption
        for file in sorted(pool.glob("*.parquet"))
        for caption in pq.read_table(file, columns=["caption"])["caption"].to_pylist()
    ]
    words = Counter(w for c in captions for w in re.findall(r"[a-z]+", (c or "").lower()))
    entries = tmp_path / "entries.json"
    entries.write_text(json.dumps([word for word, _ in words.most_common(500)]))
    options = [
        *(f"+annotate@annotate.{name}={name}" for name in ANNOTATORS),
        *(f"+select@select.{name}={name}" for name in SELECTORS),
        f"annotate.entries.entries={entries}",
        f"order=[{','.join(SELECTORS)}]",
        "pack.records_per_shard=500",
    ]
    made = Runs(root, pool, tmp_path, options)
    yield made
    made.close()


def durations(runs: Runs) -> dict[str, float]:
    """Seconds of each stage of an undisturbed run."""
    runs.start(workers=1)
    spent, last = dict.fromkeys((*STAGES, "done"), 0.0), time.monotonic()
    while (code := runs.ended(0.01)) is None:
        now, stage = time.monotonic(), runs.stage()
        spent[stage] += now - last
        last = now
    assert code == 0, (runs.place / "errors.txt").read_text()
    return spent


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_fifty_random_points_it_ends_with_the_same_bytes(runs):
    spent = durations(runs)
    expected, kept = digests(runs.out), runs.out.with_name("quiet")
    runs.out.rename(kept)
    luck, hits, finished, rounds = random.Random(0), Counter(), 0, 0
    while sum(hits.values()) < KILLS:
        runs.forget()
        rounds += 1
        workers = 2 if rounds % 4 == 0 else 1
        for wanted in POINTS:
            group = runs.start(workers)
            code = None
            while code is None and STAGES.index(wanted) > (*STAGES, "done").index(runs.stage()):
                code = runs.ended(0.01)
            if code is None:
                code = runs.ended(luck.uniform(0, spent[wanted]))
            if code is None:
                hits[runs.stage()] += 1
                runs.kill(group)
            else:
                assert code == 0, (runs.place / "errors.txt").read_text()
            if (runs.out / "manifest.json").exists():  # it never looks whole before it is
                assert digests(runs.out).items() >= expected.items()
            if code == 0:
                break
        runs.start(workers)
        code = runs.ended(300)
        assert code == 0, (runs.place / "errors.txt").read_text()
        assert digests(runs.out) == expected, f"after {sum(hits.values())} kills"
        finished += 1
    print(f"{sum(hits.values())} kills {dict(hits)} in {finished} runs")
    assert set(hits) >= set(STAGES)


# ---- disk full


@pytest.fixture
def small_disk(tmp_path):
    """mount(size) -> a folder on a file system of that size; grow(size) gives it more."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size: str, *options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"])]
        done = subprocess.run(
            [*words, "pairwright-test", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a small disk needs root: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def curate(pool, out, cache, *overrides):
    given = ["engine.workers=1", f"pool={pool}", f"out={out}", f"cache={cache}", *overrides]
    return run(composed("curate", given))


# what is being written when the disk is full: the spool of images, a shard
@pytest.mark.parametrize(("size", "full"), [("140k", "spool"), ("700k", "shard-")])
def test_a_full_disk_under_the_shards(size, full, parquet_pool, small_disk, tmp_path):
    pool, cache = parquet_pool(200), tmp_path / "cache"
    options = ("pack.records_per_shard=20",)
    curate(pool, tmp_path / "quiet", cache, *options)
    expected = digests(tmp_path / "quiet")
    out = small_disk(size) / "out"
    with pytest.raises(ValueError, match=r"No space left on device.* make room") as caught:
        curate(pool, out, cache, *options)
    assert str(out) in str(caught.value) and full in str(caught.value)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.part"))  # it frees what it could not finish
    for shard in out.glob("shard-*"):
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == expected[shard.name]
    small_disk("20m", "remount")
    curate(pool, out, cache, *options)
    assert digests(out) == expected


def test_a_full_disk_under_the_annotations(parquet_pool, small_disk, tmp_path):
    pool, hashes = parquet_pool(400, files=4), "+annotate@annotate.hashes=hashes"
    curate(pool, tmp_path / "quiet", tmp_path / "cache", hashes)
    cache = small_disk("64k")
    with pytest.raises((ValueError, OSError), match="No space left on device"):
        curate(pool, tmp_path / "out", cache, hashes)
    assert not list(cache.rglob("*.part"))
    assert not (tmp_path / "out").exists()
    small_disk("20m", "remount")
    curate(pool, tmp_path / "out", cache, hashes)
    assert digests(tmp_path / "out") == digests(tmp_path / "quiet")


def test_a_full_disk_ends_the_command_with_one_message(root, parquet_pool, small_disk, tmp_path):
    pool, disk = parquet_pool(200), small_disk("300k")
    words = [f"pool={pool}", f"out={disk}/out", f"cache={tmp_path}/cache", "engine.workers=1"]
    done = subprocess.run(
        [sys.executable, "-m", "curation.run", *words],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "shard-000000.tar: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
