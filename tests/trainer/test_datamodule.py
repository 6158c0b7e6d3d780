"""The stream as the trainer holds it: what a checkpoint must agree with."""

import hashlib
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf

from pipeline.data.images import ImageTransform
from pipeline.data.stream import ShardStream
from pipeline.phases import Phase
from pipeline.shards import Record, write_manifest, write_shard
from pipeline.trainer.datamodule import ShardData


@pytest.fixture
def data(tmp_path, make_picture):
    def make(folder, count, **knobs):
        records = [Record(f"{n:032x}", make_picture(n), "png", f"a {n}", {}) for n in range(count)]
        entry = write_shard(tmp_path / folder, "shard-000000", records)
        write_manifest(tmp_path / folder, {"num_samples": count, "shards": [entry], "steps": []})
        made = ShardData(**{"shards": str(tmp_path / folder), **knobs})
        return made.for_run(
            transform=ImageTransform(image_size=8),
            tokenizer=lambda captions: torch.zeros(len(captions), 1, dtype=torch.long),
            phase=Phase("", OmegaConf.create({"global_batch_size": 4}), 0, 0, 5),
            seed=5,
        )

    return make


def test_data_of_another_length_or_seed_is_refused(data):
    ours = data("a", 12)
    ours.open(rank=0, world_size=1)
    state = {"epoch": 1, "index": 4, "seed": 5, "position": 16, "pairs": 12}
    ours.load_state_dict(state)
    with pytest.raises(ValueError, match="13 pairs, data.shards has 12"):
        ours.load_state_dict({**state, "pairs": 13})
    with pytest.raises(ValueError, match="set seed=6"):
        ours.load_state_dict({**state, "seed": 6})
    ours.load_state_dict({**state, "pairs": 13, "phase": "before"})  # it may read other data


def test_knobs_reach_the_stream(data, tmp_path):
    data("b", 8)
    mixture = [
        {"shards": str(tmp_path / "a"), "weight": 2},
        {"shards": str(tmp_path / "b"), "weight": 1},
    ]
    stream = data("a", 12, shards=None, mixture=mixture, workers=0, max_bad_fraction=0.3).open(
        rank=1, world_size=2
    )
    assert len(stream) == 20 and stream.rank == 1 and stream.max_bad_fraction == 0.3
    assert stream.parts[0].dataset.verify == "size"


class Counts(pl.LightningModule):
    """Keeps the captions of each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch["captions"])
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_opens_its_loader_once(data, tmp_path, monkeypatch):
    opened, loaded = [], ShardStream._loaded
    monkeypatch.setattr(ShardStream, "_loaded", lambda s: opened.append(s.position) or loaded(s))

    def fit(steps, checkpoint=None):
        ours, module = data("a", 12, workers=0), Counts()
        ours.phase = replace(ours.phase, steps=steps)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=ours, ckpt_path=checkpoint, weights_only=True)
        return module.seen, trainer

    whole, _ = fit(40)  # more steps than there are pairs
    half, trainer = fit(17)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(40, tmp_path / "half.ckpt")
    assert half + rest == whole and len(whole) == 40
    assert opened == [0, 0, 17 * 4]


def test_a_run_on_foreign_tars_that_an_older_version_began_goes_on(data, tmp_path):
    data("a", 12)
    (tmp_path / "a" / "manifest.json").unlink()
    ours = data("b", 12, shards=f"{tmp_path}/a/*.tar", cache=str(tmp_path / "cache"))
    stream = ours.open(rank=0, world_size=1)
    entry = stream.parts[0].dataset.manifest["shards"][0]
    older = hashlib.sha256(f"{(12, entry['num_bytes'], None)}\n".encode()).hexdigest()[:16]
    state = {"epoch": 1, "index": 4, "seed": 5, "position": 16, "pairs": 12}
    for found in (stream.fingerprint(), older):
        ours.load_state_dict({**state, "shards": found})
    assert stream.fingerprint() != older
    with pytest.raises(ValueError, match="other shards"):
        ours.load_state_dict({**state, "shards": "0" * 16})
