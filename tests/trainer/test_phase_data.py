"""A phase that reads other data goes on at the count of pairs, also after a kill."""

import pytest

from pipeline.shards import Record, content_uid, write_manifest, write_shard
from pipeline.trainer.module import ContrastiveModule
from pipeline.trainer.run import train
from tests.trainer import strategy_runs as runs

WORDS = [
    *runs.PHASES,
    "trainer.devices=1",
    "+phases.small.data.workers=0",
    "+phases.large.data.workers=0",
    "checkpoint_every_steps=1",
    "phases.small.samples_seen=96",  # more than the first data have: in their second epoch
]


@pytest.fixture
def other(make_picture, tmp_path):
    """50 pairs, where the first phase has 80."""
    made = []
    for number in range(50):
        image, caption = make_picture(500 + number), f"other thing {number}"
        uid = content_uid(image, caption)
        made.append(Record(uid, image, "png", caption, {"uid": uid}))
    entry = write_shard(tmp_path / "other", "shard-000000", made)
    step = {"name": "ingest", "read": 50, "kept": 50, "dropped": {}}
    write_manifest(tmp_path / "other", {"num_samples": 50, "shards": [entry], "steps": [step]})
    return tmp_path / "other"


def test_positions_are_counts_of_pairs(data, other, tmp_path, monkeypatch):
    seen, step = [], ContrastiveModule.training_step

    def watched(self, batch, batch_idx):
        seen.append((batch["first"], list(batch["uids"])))
        step(self, batch, batch_idx)

    monkeypatch.setattr(ContrastiveModule, "training_step", watched)
    cfg = runs.config_of(data, tmp_path, "x", 5, [*WORDS, f"+phases.large.data.shards={other}"])
    train(cfg)
    assert [first for first, _ in seen] == [0, 32, 64, 96, 128]
    whole = list(seen)
    (tmp_path / "x" / "checkpoints" / "step-00000005.ckpt").unlink()
    train(cfg)
    assert seen[5:] == whole[4:]
