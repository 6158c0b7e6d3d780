"""Training as a user types it: resume after kill -9 is bit-identical, a name is one run, errors
are messages.
"""

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from pipeline.tracking.metrics import MetricsFile, read_metrics
from pipeline.trainer.checkpoints import AtomicCheckpointIO, find_newest


def losses(run):
    return [(row["step"], row["train/loss"]) for row in read_metrics(run)]


def test_killed_training_resumes_bit_identically(root, data, tmp_path, train, command, environment):
    train(data, tmp_path, "whole", "micro_batch_size=12")
    whole = losses(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 21))

    started = subprocess.Popen(
        command(data, tmp_path, "killed", "micro_batch_size=12"),
        cwd=root,
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and started.poll() is None:
        # past the second checkpoint, inside the steps before the third
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 12:
            break
        time.sleep(0.001)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    newest = find_newest(tmp_path / "killed" / "checkpoints")
    assert newest is not None and newest.stem < "step-00000020"

    resumed = train(data, tmp_path, "killed", "micro_batch_size=12")
    assert f"continuing from {newest}" in resumed.stderr
    assert losses(tmp_path / "killed") == whole
    weights = [
        torch.load(find_newest(tmp_path / run / "checkpoints"), weights_only=True)["state_dict"]
        for run in ("whole", "killed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_train_as_one(data, tmp_path, train):
    train(data, tmp_path, "one", "samples_seen=192")
    train(data, tmp_path, "two", "samples_seen=192", "trainer.devices=2", "micro_batch_size=7")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, 7))
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert abs(a - b) < 2e-5


def test_a_name_is_one_run(data, tmp_path, train):
    train(data, tmp_path, "a", "samples_seen=96")
    done = train(data, tmp_path, "a", "samples_seen=96", "optimizer.lr=0.5", "seed=3", code=2)
    assert "optimizer.lr: was 0.001, now 0.5" in done.stderr and "seed: was 0, now 3" in done.stderr
    again = train(data, tmp_path, "a", "samples_seen=96")
    assert "nothing to do" in again.stderr
    assert len(losses(tmp_path / "a")) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.shards=nowhere"], "nowhere: no manifest.json"),
        (["recipe=nothing"], "emoji"),
        (["optimizer.lrr=1"], "lrr"),
        (["trainer.devices=3"], "32 is not a multiple of 3 processes"),
        (["global_batch_size=128", "samples_seen=512"], "80 pairs, fewer than one batch of 128"),
    ],
)
def test_mistakes_end_with_a_message(data, tmp_path, overrides, words, train):
    done = train(data, tmp_path, "bad", *overrides, code=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_torn_metrics_file_is_rewound(tmp_path):
    metrics = MetricsFile(directory=str(tmp_path))
    for step in (1, 2, 3):
        metrics.log_metrics({"train/loss": 1 / 3}, step=step)
    with open(metrics.path, "a") as file:
        file.write('{"step": 4, "train/l')
    metrics.rewind(2)
    assert read_metrics(tmp_path) == [{"step": n, "train/loss": 1 / 3} for n in (1, 2)]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "step-00000005.ckpt"
    writer.save_checkpoint({"step": torch.tensor(1)}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        writer.save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_resolved_config_is_left_beside_the_metrics(data, tmp_path, train):
    train(data, tmp_path, "a", "samples_seen=96")
    config = (tmp_path / "a" / "config.yaml").read_text()
    assert "context_length: 16" in config and "${" not in config
    json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0])
