"""An offline W&B run's own file, read back without a server."""

import json
import struct
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2 as proto

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


def items(update):
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in update}


@pytest.fixture
def offline():
    """offline(path) -> (rows, config) of a run-*.wandb file."""

    def read(path):
        rows, config = [], {}
        for record in offline_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append(items(record.history.item))
            elif kind == "config":
                config |= items(record.config.update)
            elif kind == "run":
                config |= items(record.run.config.update)
        return rows, config

    read.records = offline_records
    return read
