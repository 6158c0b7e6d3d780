"""What reaches W&B in an offline run: read back from its own file, without a server."""

import time

import pytest

from pipeline.tracking.wandb import wandb_logger


def test_an_offline_run_holds_the_name_the_rows_and_the_axis(tmp_path, offline):
    logger = wandb_logger(name="first", directory=str(tmp_path))
    for step in (1, 2):
        row = {"train/loss": 1 / step, "samples_seen": 256 * step}
        logger.log_metrics(row, step=step)
    logger.experiment.finish()
    (path,) = tmp_path.rglob("run-first.wandb")
    until = time.monotonic() + 30  # W&B's own process writes the file a little later
    while len(offline(path)[0]) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    rows, _ = offline(path)
    records = list(offline.records(path))
    assert [row["train/loss"] for row in rows] == [1.0, 0.5]
    assert [row["samples_seen"] for row in rows] == [256, 512]
    assert {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"} == {"first"}
    axes = {r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert "samples_seen" in axes


def test_another_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.wandb\.mode=of: modes are offline, online"):
        wandb_logger(name="first", directory=str(tmp_path), mode="of")
