"""A signal ends a run between two steps, and the same command continues it to the same bits; a run
that hangs says where, and ends.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.callbacks.preemption import Preemption
from pipeline.trainer.callbacks.watchdog import Watchdog
from pipeline.trainer.checkpoints import find_newest, step_of


def losses(run):
    return [(row["step"], row["train/loss"]) for row in read_metrics(run)]


def weights(run):
    return torch.load(find_newest(run / "checkpoints"), weights_only=True)["state_dict"]


def rows(run):
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def start(command, **options):
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for_rows(process, run, count):
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and rows(run) < count:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_ends_between_steps(root, data, tmp_path, train, command, environment, name):
    # a checkpoint every 1,000 steps: what continues is what the signal wrote
    knobs = ("checkpoint_every_steps=1000", "trainer.devices=2", "samples_seen=960")
    process = start(command(data, tmp_path, "a", *knobs), cwd=root, env=environment())
    wait_for_rows(process, tmp_path / "a", 3)
    process.send_signal(getattr(signal, f"SIG{name}"))  # to the first rank alone
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"SIG{name}: stopped after step" in errors
    stopped = step_of(find_newest(tmp_path / "a" / "checkpoints"))
    assert 3 <= stopped < 30
    assert losses(tmp_path / "a")[-1][0] == stopped
    if name == "TERM":
        return  # the rest is the same
    train(data, tmp_path, "a", *knobs)
    train(data, tmp_path, "whole", *knobs)
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")
    one, whole = weights(tmp_path / "a"), weights(tmp_path / "whole")
    assert all(torch.equal(one[key], whole[key]) for key in whole)


def test_ranks_agree_on_the_step_before(monkeypatch):
    """Reading the flag of the step that has just ended would wait for the optimizer's kernels."""
    others = iter([0.0, 1.0, 0.0, 0.0, 1.0])
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda flag, op: flag.clamp_(min=next(others))
    )
    callback, cpu = Preemption(), torch.device("cpu")
    many, last, one = (
        SimpleNamespace(world_size=size, global_step=step, max_steps=9)
        for size, step in ((2, 1), (2, 9), (1, 1))
    )
    assert [callback._asked(many, cpu) for _ in range(4)] == [False, False, True, False]
    assert callback._asked(last, cpu)  # there is no later step
    callback.received = "SIGUSR1"
    assert callback._asked(one, cpu)


def test_a_run_that_hangs_says_where(root, data, tmp_path, command, environment):
    # the data hangs after some batches: a sampler of the test's own
    (tmp_path / "hanging.py").write_text(
        "import time\n"
        "class Hanging:\n"
        "    count = 0\n"
        "    def __call__(self, captions, primary, rng, epoch):\n"
        "        self.count += 1\n"
        "        if self.count > 150:\n"
        "            time.sleep(1000)\n"
        "        return captions[primary]['text'] if captions else ''\n"
    )
    knobs = ["callbacks.watchdog.timeout_seconds=8", "data.workers=0"]
    knobs += ["data.captions={_target_: hanging.Hanging}", "allow_foreign_targets=true"]
    env = environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run(
        command(data, tmp_path, "hung", *knobs),
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 70, done.stderr
    assert "no step for 8 s" in done.stderr
    stacks = (tmp_path / "hung" / "stacks-rank0.txt").read_text()
    assert 'hanging.py", line 7' in stacks


def test_stopped_time_is_not_hanging(tmp_path):
    program = (
        "import sys, time\n"
        "from types import SimpleNamespace\n"
        "from pipeline.trainer.callbacks.watchdog import Watchdog\n"
        "watchdog = Watchdog(timeout_seconds=2)\n"
        f"watchdog.on_train_start(SimpleNamespace(default_root_dir={str(tmp_path)!r}, "
        "global_rank=0), None)\n"
        "print('watched', flush=True)\n"
        "time.sleep(float(sys.argv[1]))\n"
        "watchdog.teardown()\n"
    )
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", program, "1"]
    process = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "watched\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Preemption(signals=["USR3"]), "'USR3'.*is no signal"),
        (lambda: Watchdog(timeout_seconds=0), "above 0, or null"),
    ],
)
def test_wrong_knobs_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
