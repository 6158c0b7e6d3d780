"""Killed at random steps, on one process and on two, or moved from one to two to four: the same
losses.
"""

import os
import random
import signal
import subprocess
import time

import pytest
import torch

from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.checkpoints import find_newest, step_of

KILLS_OF_A_RUN = 5


def losses(run):
    return [(row["step"], row["samples_seen"], row["train/loss"]) for row in read_metrics(run)]


def weights(run):
    return torch.load(find_newest(run / "checkpoints"), weights_only=True)["state_dict"]


@pytest.fixture
def killed_at(root, data, command, environment, tmp_path):
    """killed_at(name, step, *overrides): started, and killed once that step is written."""

    def start(name, step, *overrides):
        started = subprocess.Popen(
            command(data, tmp_path, name, *overrides),
            cwd=root,
            env=environment(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        metrics, until = tmp_path / name / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < until and started.poll() is None:
            rows = metrics.read_text().splitlines() if metrics.exists() else []
            # a torn last row does not count
            if sum(row.endswith("}") for row in rows) >= step:
                break
            time.sleep(0.001)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()

    return start


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_change_no_bit(data, train, killed_at, tmp_path, processes):
    """Four runs, each killed at five random steps."""
    options = [f"trainer.devices={processes}", "micro_batch_size=7", "checkpoint_every_steps=3"]
    train(data, tmp_path, "whole", *options)
    whole, draw, kills = losses(tmp_path / "whole"), random.Random(processes), []
    assert [row[0] for row in whole] == list(range(1, 21))
    for run in range(4):
        name = f"killed-{run}"
        for step in sorted(draw.sample(range(1, 20), KILLS_OF_A_RUN)):
            killed_at(name, step, *options)
            kills.append((step, step_of(find_newest(tmp_path / name / "checkpoints"))))
        train(data, tmp_path, name, *options)
        assert losses(tmp_path / name) == whole, kills
        ours, theirs = weights(tmp_path / name), weights(tmp_path / "whole")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), kills
    assert len(kills) == 20 and any(step > saved for step, saved in kills)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_moves_from_one_process_to_two_to_four(data, train, killed_at, tmp_path):
    """In float64, where only the order of sums differs; the pairs of a batch are the same."""
    options = ["trainer.precision=64-true", "checkpoint_every_steps=3"]
    train(data, tmp_path, "whole", *options)
    killed_at("moved", 7, *options)
    killed_at("moved", 14, *options, "trainer.devices=2", "micro_batch_size=5")
    train(data, tmp_path, "moved", *options, "trainer.devices=4", "micro_batch_size=3")
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert [row[:2] for row in moved] == [row[:2] for row in whole]
    assert max(abs(a[2] - b[2]) for a, b in zip(moved, whole, strict=True)) <= 1e-6
