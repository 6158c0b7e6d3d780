"""engine=slurm on a real SLURM: an array of jobs makes the local engine's bytes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]  # Python starts some 20 times
HERE = Path(__file__).parent


@pytest.fixture
def curate(root, slurm, parquet_pool, tmp_path):
    """curate(out, *overrides, failures, seconds) starts the command as a user does."""
    pool = parquet_pool(60, files=3)
    failures = tmp_path / "failures"
    failures.mkdir()

    def start(name: str, *overrides: str, seconds: float = 0.0) -> subprocess.Popen:
        env = slurm.env | {
            "PYTHONPATH": str(HERE),
            "FLAKY_FAILURES": str(failures),
            "FLAKY_SECONDS": str(seconds),
            "OMP_NUM_THREADS": "1",
        }
        given = [f"pool={pool}", f"out={tmp_path / name}", f"cache={tmp_path / name}-cache"]
        given += ["+annotate.flaky._target_=flaky.Flaky", "allow_foreign_targets=true"]
        given += ["pack.records_per_shard=20", *overrides]
        return subprocess.Popen(
            [sys.executable, "-m", "curation.run", *given],
            cwd=root,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    start.failures = failures
    return start


def on_slurm(slurm, **knobs):
    given = {"partition": slurm.partition, "workers": 3, "poll_seconds": 0.5, "retries": 0}
    given |= {"settle_seconds": 1, "memory_gib": 1} | knobs
    return ["engine=slurm", *(f"engine.{key}={value}" for key, value in given.items())]


def finish(process, code=0):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    return errors


def contents(folder):
    """By file; without the manifest's line of the commit, which may change while a test runs."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    lines = found["manifest.json"].splitlines()
    found["manifest.json"] = b"".join(line for line in lines if b"created_by_commit" not in line)
    return found


def test_an_array_with_a_failing_task_makes_the_local_bytes(slurm, curate, tmp_path):
    finish(curate("local", "engine.workers=1"))
    (curate.failures / "once").touch()
    errors = finish(curate("slurm", *on_slurm(slurm, retries=1)))
    assert "flaky: retry 1 of 1" in errors
    assert "the disk of this node is on fire" in errors  # the task's own words, not only its number
    assert contents(tmp_path / "slurm") == contents(tmp_path / "local")
    assert len(list((tmp_path / "slurm").glob("shard-*.tar"))) == 3
    logs = tmp_path / "slurm-cache" / "logs"
    arrays = {path.parent.name.split("-")[0] for path in logs.glob("*/launch_script.slurm")}
    assert arrays == {"ingest", "flaky", "pack"}
    assert not slurm.jobs()  # and no job is left that waits for ever


def test_a_lasting_failure_ends_with_the_tasks_words_and_what_is_done_stays(
    slurm, curate, tmp_path
):
    for number in range(3):
        (curate.failures / str(number)).touch()
    options = ("only=annotate", *on_slurm(slurm))
    errors = finish(curate("out", *options), code=1)
    assert "RuntimeError: flaky:" in errors and "of 12 units are missing" in errors, errors
    assert "the disk of this node is on fire" in errors
    errors = finish(curate("out", *options))
    assert "ingest: nothing to do" in errors


def test_the_array_of_a_killed_command_is_waited_for(slurm, curate, tmp_path):
    options = ("only=annotate", *on_slurm(slurm))
    finish(curate("out", "only=ingest", *on_slurm(slurm)))
    first = curate("out", *options, seconds=2.0)
    until = time.monotonic() + 120
    while "clip-curate-flaky" not in slurm.jobs() and time.monotonic() < until:
        time.sleep(0.2)
    job_file = next((tmp_path / "out-cache" / "logs").glob("flaky-*")) / "slurm_job"
    while not job_file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(first.pid, 9)
    first.communicate()
    errors = finish(curate("out", *options))
    assert "which an earlier run has left at work" in errors


def test_what_sbatch_refuses_is_a_users_mistake(slurm, curate):
    errors = finish(curate("out", *on_slurm(slurm, partition="gpu_farm")), code=2)
    assert "engine.partition=gpu_farm" in errors and "Traceback" not in errors


def test_without_slurm_it_says_so(slurm, curate, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "git").symlink_to(shutil.which("git"))
    monkeypatch.setitem(slurm.env, "PATH", str(tools))
    errors = finish(curate("out", *on_slurm(slurm)), code=2)
    assert "no sbatch here" in errors
