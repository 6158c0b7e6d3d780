"""Engines: what they say, that any of them makes the same bytes, that work is done once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curation.engine import LocalEngine, Unit
from curation.engines.ray import RayEngine
from curation.engines.slurm import SlurmEngine
from curation.run import run
from pipeline.check import composed

FLAKY = Path(__file__).resolve().parents[1] / "slurm"  # the annotator that fails when told


def write(path, number):
    """The work of a unit."""
    if number < 0:
        raise OSError(f"unit {number} cannot be done")
    path.write_text(f"{number}\n")


def units(folder, numbers):
    folder.mkdir(exist_ok=True)
    return [Unit(folder / str(n), (folder / str(n), n), 1) for n in numbers]


def curate(pool, out, *overrides):
    given = ["engine.workers=1", f"pool={pool}", f"out={out}", *overrides]
    return run(composed("curate", given))


def contents(folder):
    """By file; without the manifest's line of the commit, which may change while a test runs."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    lines = found["manifest.json"].splitlines()
    found["manifest.json"] = b"".join(line for line in lines if b"created_by_commit" not in line)
    return found


def test_it_says_what_it_finds(tmp_path, caplog):
    caplog.set_level("INFO")
    engine, logs = LocalEngine(workers=1), tmp_path / "logs"
    first = units(tmp_path / "first", range(3))
    assert engine.run("words", write, [], logs / "words-aaaa") == 0
    assert caplog.messages == []  # a stage without units says nothing
    engine.run("words", write, first[:1], logs / "words-aaaa")
    assert engine.run("words", write, first, logs / "words-aaaa") == 2
    assert engine.run("words", write, first, logs / "words-aaaa") == 0
    other = units(tmp_path / "other", range(3))
    assert engine.run("words", write, other, logs / "words-bbbb") == 3
    assert caplog.messages == [
        "words: first run (words-aaaa), 1 units to do",
        "words: going on, 1 of 3 units are there (words-aaaa)",
        "words: nothing to do, all 3 units are there (words-aaaa)",
        "words: new settings (words-bbbb), 3 units to do",
    ]


def test_a_failing_unit_stops_the_run_and_what_is_done_stays(tmp_path, capfd):
    work = units(tmp_path / "work", (1, 2, -3, 4))
    engine = LocalEngine(workers=1, tasks=1)
    with pytest.raises(OSError, match="unit -3 cannot be done"):
        engine.run("work", write, work, tmp_path / "logs" / "work-a")
    assert [unit.done for unit in work] == [True, True, False, False]
    assert "unit -3 cannot be done" not in capfd.readouterr().err  # said once, by who catches it
    assert "unit -3 cannot be done" in next(tmp_path.rglob("task_00000.log")).read_text()
    assert engine.run("work", write, [work[0], work[3]], tmp_path / "logs" / "work-a") == 1


def test_only_what_depends_on_a_changed_setting_is_done_again(parquet_pool, tmp_path, caplog):
    entries = tmp_path / "entries.json"
    entries.write_text(json.dumps(["thing", "row"]))
    hashes = "+annotate.hashes._target_=curation.annotate.hashes.Hashes"
    matcher = "+annotate.entries._target_=curation.annotate.entries.Entries"
    both = (hashes, matcher, f"+annotate.entries.entries={entries}", "only=annotate")
    pool, out = parquet_pool(23), tmp_path / "out"
    curate(pool, out, *both)
    folders = set((tmp_path / "pool.annotations").glob("*-*"))
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*.*")}
    caplog.set_level("INFO")
    curate(pool, out, *both, "+annotate.entries.lower_case=true")
    said = {line.partition(":")[0]: line for line in caplog.messages}
    assert "nothing to do" in said["ingest"] and "nothing to do" in said["hashes"]
    assert "new settings" in said["entries"] and "2 units to do" in said["entries"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (new,) = set((tmp_path / "pool.annotations").glob("*-*")) - folders
    assert f"({new.name})" in said["entries"]
    caplog.clear()
    entries.write_text(json.dumps(["thing", "number"]))  # the same path, another content
    curate(pool, out, *both)
    assert any("entries: new settings" in line for line in caplog.messages)


def test_one_two_and_four_workers_make_the_same_bytes(parquet_pool, tmp_path):
    pool, results = parquet_pool(41, files=4), []
    for workers in (1, 2, 4):
        out = tmp_path / f"out{workers}"
        options = ("pack.records_per_shard=7", f"engine.workers={workers}")
        curate(pool, out, *options, f"cache={tmp_path}/cache{workers}")
        results.append({k: hashlib.sha256(v).hexdigest() for k, v in contents(out).items()})
    assert len(results[0]) == 2 * 6 + len(
        {"manifest.json", "report.html", "rejected.parquet", "card.json"}
    )
    assert results[0] == results[1] == results[2]


WRONG = {
    "no worker": (LocalEngine, {"workers": -1}, "workers=-1"),
    "no retry": (RayEngine, {"retries": -1}, "retries=-1"),
    "too wide": (SlurmEngine, {"partition": "main", "tasks": 5000}, "1000 jobs at most"),
    "no memory": (SlurmEngine, {"partition": "main", "memory_gib": 0}, "memory_gib=0"),
    "no processor": (RayEngine, {"cpus_per_task": 0}, "cpus_per_task=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused(case):
    engine, settings, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        engine(**settings)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_makes_the_local_bytes_and_gives_out_again_what_failed(root, parquet_pool, tmp_path):
    pytest.importorskip("ray", reason="Ray: pip install 'pairwright[ray]'")
    pool, failures = parquet_pool(60, files=3), tmp_path / "failures"
    failures.mkdir()
    env = os.environ | {"PYTHONPATH": str(FLAKY), "FLAKY_FAILURES": str(failures)}

    def command(name, *overrides):
        given = [f"pool={pool}", f"out={tmp_path / name}", f"cache={tmp_path / name}-cache"]
        given += ["+annotate.flaky._target_=flaky.Flaky", "allow_foreign_targets=true"]
        given += ["pack.records_per_shard=20", *overrides]
        return subprocess.run(
            [sys.executable, "-m", "curation.run", *given],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    done = command("local", "engine.workers=1")
    assert done.returncode == 0, done.stderr
    ray = ("engine=ray", "engine.workers=2", "engine.memory_gib=0.2")
    (failures / "once").touch()
    done = command("ray", *ray, "engine.retries=0")
    assert done.returncode == 1
    assert "RuntimeError: flaky:" in done.stderr and "units are missing" in done.stderr
    assert "the disk of this node is on fire" in done.stderr
    (failures / "once more").touch()
    done = command("ray", *ray, "engine.retries=1")
    assert done.returncode == 0, done.stderr
    assert "flaky: retry 1 of 1" in done.stderr and "ingest: nothing to do" in done.stderr
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    done = command("small", *ray, "engine.memory_gib=100000")
    assert done.returncode == 2 and "engine.memory_gib=100000" in done.stderr
