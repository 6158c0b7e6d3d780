"""Training on a real SLURM: two tasks, a job queued again by a signal, a sweep, and the chain."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.checkpoints import find_newest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
ENDED = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2")


@pytest.fixture
def place(root, slurm, tmp_path):
    """Where jobs run: the checkout's code, this Python first on the PATH, runs in tmp_path."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{slurm.env['PATH']}"
    env = slurm.env | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return {"cwd": root, "env": env | {"MAX_RESTARTS": "5", "GLOO_SOCKET_IFNAME": "lo"}}


def words(command, data, runs, name, *overrides):
    """What one types behind the file: the command's words without Python's."""
    return command(data, runs, name, "trainer.accelerator=cpu", *overrides)[3:]


def sbatch(place, log, *rest, file="slurm/train.sbatch"):
    given = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", *rest]
    at = len(given) - len(rest) + sum(word.startswith("--") for word in rest)
    given.insert(at, file)
    done = subprocess.run(given, **place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(slurm, job):
    shown = slurm.command("scontrol", "show", "job", job, "--oneliner")
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def wait(slurm, job, *, log=None, seconds=300, until=("COMPLETED",)):
    """The job's last state; a job that waits to start again is started soon."""
    end, ended, hastened = time.monotonic() + seconds, 0, False
    while time.monotonic() < end:
        found = state(slurm, job)
        if found["JobState"] in until:
            return found
        # a job that is being queued again looks cancelled or failed for a moment
        ended = ended + 1 if found["JobState"] in ENDED else 0
        if ended > 20:
            break
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime" and not hastened:
            # A job that is queued again is held for two minutes, and one that starts in the second
            # of its requeueing is taken for the one that was ended ("Job credential revoked").
            slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now+4")
            hastened = True
        time.sleep(0.3)
    text = Path(log).read_text() if log and Path(log).exists() else ""
    raise AssertionError(f"job {job}: {found['JobState']} {found.get('ExitCode')}\n{text[-4000:]}")


def losses(run):
    return [(row["step"], row["train/loss"]) for row in read_metrics(run)]


def weights(run):
    return torch.load(find_newest(run / "checkpoints"), weights_only=True)["state_dict"]


def wait_for_rows(run, count, log):
    until = time.monotonic() + 240
    while time.monotonic() < until:
        file = run / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(log.read_text()[-4000:])


def wait_for_words(text, log):
    until = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(0.1)


def test_a_signal_queues_a_job_again_and_it_continues(slurm, place, data, tmp_path, command):
    knobs = ("samples_seen=6400", "checkpoint_every_steps=1000", "micro_batch_size=8")
    log = tmp_path / "whole.log"
    whole = sbatch(place, log, *TWO_TASKS, *words(command, data, tmp_path, "whole", *knobs))
    wait(slurm, whole, log=log)
    assert "2, 16 pairs each" in log.read_text()  # two tasks are two processes

    log = tmp_path / "a.log"
    job = sbatch(place, log, *TWO_TASKS, *words(command, data, tmp_path, "a", *knobs))
    wait_for_rows(tmp_path / "a", 4, log)
    slurm.command("scancel", "--signal=USR1", job)
    wait_for_words("exit code 75, restart 1", log)
    found = wait(slurm, job, log=log)
    assert found["Restarts"] == "1"
    text = log.read_text()
    assert text.count("stopped after step") == 1 and text.count("continuing from") == 1
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "a")] == list(range(1, 201))
    one, other = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_mistake_is_not_queued_again(slurm, place, data, tmp_path, command):
    log = tmp_path / "bad.log"
    job = sbatch(place, log, *words(command, data, tmp_path, "bad", "global_batch_size=7000"))
    found = wait(slurm, job, log=log, until=("FAILED",))
    assert found["ExitCode"] == "2:0" and found["Restarts"] == "0"
    assert "fewer than one batch of 7000" in log.read_text() or "samples_seen" in log.read_text()


def test_a_killed_process_ends_the_job_and_starts_it_again(slurm, place, data, tmp_path, command):
    log = tmp_path / "a.log"
    given = words(command, data, tmp_path, "a", "samples_seen=6400")
    job = sbatch(place, log, *TWO_TASKS, *given)
    wait_for_rows(tmp_path / "a", 8, log)
    slurm.command("scancel", "--signal=KILL", f"{job}.0")  # the processes, not the script
    wait_for_words("restart 1", log)
    found = wait(slurm, job, log=log)
    assert found["Restarts"] == "1"
    assert [step for step, _ in losses(tmp_path / "a")] == list(range(1, 201))


def test_the_chain(slurm, place, data, tmp_path, command):
    log = tmp_path / "chain-%j.log"
    options = ["--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}"]
    given = words(command, data, tmp_path, "chained", "samples_seen=192")
    done = subprocess.run(
        ["slurm/chain.sh", *options, "--", *given, "--", "eval=emoji", "accelerator=cpu", "--"]
        + ["format=transformers"],
        **place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in done.stderr.splitlines())
    assert list(jobs) == ["train", "evaluate", "export"]
    for what, job in jobs.items():
        wait(slurm, job, log=str(log).replace("%j", job))
        assert what in ("train", "evaluate", "export")
    run = tmp_path / "chained"
    assert json.loads((run / "eval" / "zero_shot.json").read_text())["metrics"]
    assert (run / "export" / "model.safetensors").exists()


def test_the_chain_wants_its_parts(place):
    done = subprocess.run(
        ["slurm/chain.sh", "recipe=emoji", "name=x"],
        **place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "found 0 of 3 '--'" in done.stderr


def test_a_sweep_of_two_jobs(slurm, place, data, tmp_path, command):
    given = command(data, tmp_path, "sweep-lr${optimizer.lr}", "samples_seen=96")
    given[3:3] = ["-m", "optimizer.lr=0.001,0.002", "hydra/launcher=submitit_slurm"]
    given += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]
    given += [f"hydra.sweep.dir={tmp_path / 'sweep'}", "trainer.accelerator=cpu"]
    done = subprocess.run(given, **place, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    for lr in ("0.001", "0.002"):
        assert len(losses(tmp_path / f"sweep-lr{lr}")) == 3
