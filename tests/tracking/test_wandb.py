"""What reaches W&B in an offline run: read back from its own file, without a server."""

import json
import struct
import time
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2 as proto

from pipeline.tracking.wandb import wandb_logger

BLOCK, HEADER = 32768, 7  # the framing is LevelDB's log: checksum, length, kind


def offline_records(path: Path):
    """The protobuf records of a run-*.wandb file."""
    data, position, pieces = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if not kind:
            return
        position += HEADER
        pieces += data[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = proto.Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def rows(records):
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]


def test_an_offline_run_holds_the_name_the_rows_and_the_axis(tmp_path):
    logger = wandb_logger(name="first", directory=str(tmp_path))
    for step in (1, 2):
        row = {"train/loss": 1 / step, "samples_seen": 256 * step}
        logger.log_metrics(row, step=step)
    logger.experiment.finish()
    (path,) = tmp_path.rglob("run-first.wandb")
    until = time.monotonic() + 30  # W&B's own process writes the file a little later
    while len(rows(list(offline_records(path)))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    records = list(offline_records(path))
    assert [row["train/loss"] for row in rows(records)] == [1.0, 0.5]
    assert [row["samples_seen"] for row in rows(records)] == [256, 512]
    assert {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"} == {"first"}
    axes = {r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert "samples_seen" in axes


def test_another_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.wandb\.mode=of: modes are offline, online"):
        wandb_logger(name="first", directory=str(tmp_path), mode="of")
