"""Datasets for the tests of the loader."""

import pytest
import torch

from pipeline.data.images import ImageTransform
from pipeline.data.stream import ShardStream
from pipeline.shards import Record, content_uid, write_manifest, write_shard


@pytest.fixture(scope="session")
def write_dataset(make_picture):
    """write(folder, counts, first=0) -> folder: shards of so many pairs, captions `caption N`."""

    def write(folder, counts, first=0, **manifest):
        entries, number = [], first
        for shard, count in enumerate(counts):
            made = []
            for _ in range(count):
                image, caption = make_picture(number), f"caption {number}"
                uid = content_uid(image, caption)
                made.append(Record(uid, image, "png", caption, {"uid": uid}))
                number += 1
            entries.append(write_shard(folder, f"shard-{shard:06d}", made))
        total = sum(counts)
        step = {"name": "ingest", "read": total, "kept": total, "dropped": {}}
        fields = {"num_samples": total, "shards": entries, "steps": [step], **manifest}
        write_manifest(folder, fields)
        return folder

    return write


@pytest.fixture(scope="session")
def make_stream():
    """make(shards or None, batch, **knobs) -> a stream whose tokens are the captions' numbers."""

    def tokenizer(captions):
        return torch.tensor([[int(caption.split()[-1])] for caption in captions])

    def make(shards, batch=8, **knobs):
        transform = ImageTransform(image_size=16, crop_scale=(0.5, 1.0), flip=0.5)
        return ShardStream(
            shards=None if shards is None else str(shards),
            transform=transform,
            tokenizer=tokenizer,
            global_batch_size=batch,
            **{"window_shards": 2, "seed": 3, **knobs},
        )

    return make


@pytest.fixture(scope="session")
def take():
    """take(stream, n) -> its next n batches."""
    return lambda stream, batches: [b for b, _ in zip(stream, range(batches), strict=False)]
