"""The stream as the trainer holds it: what a checkpoint must agree with."""

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.data.images import ImageTransform
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
