"""The command, as a user types it: caching, resume, identical bytes, messages."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hydra.errors import HydraException

from curation.run import run
from pipeline.check import composed
from pipeline.shards import read_manifest, records

SMALL = ("pack.records_per_shard=5",)


def curate(pool, out, *overrides):
    """As the command does it, in this process; one worker unless the overrides say otherwise."""
    given = ["engine.workers=1", f"pool={pool}", f"out={out}", *overrides]
    return run(composed("curate", given))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_pool_becomes_shards_and_a_second_run_does_nothing(parquet_pool, tmp_path, caplog):
    pool, out = parquet_pool(23), tmp_path / "out"
    curate(pool, out, *SMALL)
    manifest = read_manifest(out)
    assert manifest["num_samples"] == 23 == len(list(records(out)))
    assert [shard["num_samples"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    uids = [record.uid for record in records(out)]
    assert uids == sorted(uids)
    assert (tmp_path / "pool.annotations").is_dir()  # the cache's default place: beside the pool
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    caplog.set_level("INFO")
    curate(pool, out, *SMALL)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "nothing to do" in caplog.text


def test_workers_do_not_change_a_byte(parquet_pool, tmp_path):
    pool = parquet_pool(23)
    results = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        options = ("pack.records_per_shard=5", f"engine.workers={workers}")
        curate(pool, out, *options, f"cache={tmp_path}/cache{workers}")
        results.append(contents(out))
    assert results[0] == results[1]


def test_killed_anywhere_it_continues_to_the_same_bytes(root, parquet_pool, tmp_path):
    pool = parquet_pool(60, files=4)
    options = ("pack.records_per_shard=2", "engine.workers=2")
    curate(pool, tmp_path / "quiet", *options, f"cache={tmp_path}/quiet-cache")
    out, kills = tmp_path / "out", 0
    command = [sys.executable, "-m", "curation.run", f"pool={pool}", f"out={out}", *options]
    luck = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen(
            command, cwd=root, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + 60
        wanted = luck.randint(1, 25)  # kill while the shards are being written, after this many
        while time.monotonic() < until and child.poll() is None:
            if len(list(out.glob("shard-*.tar"))) >= wanted:
                break
            time.sleep(0.002)
        if child.poll() is None:
            kills += 1
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            assert not (out / "manifest.json").exists()  # half a dataset never looks whole
    assert kills >= 1
    curate(pool, out, *options)
    assert contents(out) == contents(tmp_path / "quiet")


def test_another_selection_replaces_the_old_one(parquet_pool, tmp_path):
    pool, out = parquet_pool(23), tmp_path / "out"
    curate(pool, out, "pack.records_per_shard=5")
    curate(pool, out, "pack.records_per_shard=20")
    assert [shard["num_samples"] for shard in read_manifest(out)["shards"]] == [20, 3]
    assert len(list(out.glob("shard-*.tar"))) == 2


def test_somebody_elses_folder_is_left_alone(parquet_pool, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        curate(parquet_pool(5), out)
    assert (out / "thesis.tex").read_text() == "ten years of work"


def test_a_changed_pool_file_is_refused_by_name(parquet_pool, tmp_path):
    pool, out = parquet_pool(10), tmp_path / "out"
    curate(pool, out)
    path = pool / "part-1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ValueError, match="part-1.parquet changed since it was ingested"):
        curate(pool, out)


def test_a_pair_that_the_pool_holds_twice_is_kept_once(parquet_pool, tmp_path):
    pool = parquet_pool(10, files=1)
    table = pq.read_table(pool / "part-0.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(2, 3)]), pool / "part-0.parquet")
    curate(pool, tmp_path / "out")
    steps = {step["name"]: step for step in read_manifest(tmp_path / "out")["steps"]}
    assert steps["ingest"]["read"] == 13
    assert steps["unique_uid"]["dropped"] == {"same_pair": 3}
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet")
    assert pc.unique(rejected["reason"]).to_pylist() == ["same_pair"]


WRONG = {
    "typo in a key": (["poool=x"], "poool"),
    "unknown dataset": (["dataset=nope"], "raw"),
    "typo in a component": (["ingest.max_pixel=3"], "max_pixel"),
    "wrong type": (["pack.records_per_shard=many"], "records_per_shard"),
    "unknown stage": (["only=publish"], "ingest, annotate, select, pack"),
    "unknown selector": (["order=[parot]"], "parot"),
    "empty pool": (["pool=conf"], "no *.parquet with image bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_before_anything_is_built(case, parquet_pool, tmp_path):
    overrides, words = WRONG[case]
    with pytest.raises((ValueError, HydraException), match=re.escape(words)):
        curate(parquet_pool(3), tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_mistake_and_ends_with_2(root, tmp_path):
    command = [sys.executable, "-m", "curation.run", f"pool={tmp_path}", f"out={tmp_path}/out"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no *.parquet with image bytes" in done.stderr and "Traceback" not in done.stderr
