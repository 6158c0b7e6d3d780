"""pipeline.train_captioner: one command from shards and a proxy to a captioner; resume is
bit-identical.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.check import composed
from pipeline.config import build, check
from pipeline.data.tokenizer import train_bpe
from pipeline.evals.trained_captioner import TrainedCaptioner
from pipeline.shards import Record, content_uid, write_manifest, write_shard
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.captioner import dropped_images, train_captioner


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_picture):
    """shards, and the run directory of an untrained proxy."""
    folder, made = tmp_path_factory.mktemp("data"), []
    for number in range(24):
        image, caption = make_picture(number), f"thing number {number}"
        uid = content_uid(image, caption)
        made.append(Record(uid, image, "png", caption, {"uid": uid}))
    entry = write_shard(folder / "shards", "shard-000000", made)
    write_manifest(folder / "shards", {"num_samples": 24, "shards": [entry], "steps": []})
    size = train_bpe((r.caption for r in made), vocab_size=560, directory=folder / "tokenizer")
    tower = {"layers": 1, "width": 16, "heads": 2}
    model = composed("train", ["recipe=emoji", "debug=tiny", "name=x", "data.shards=y"]).model
    model.image = {**model.image, "image_size": 8, "patch_size": 4, **tower}
    model.text = {**model.text, "vocab_size": size, "context_length": 8, **tower}
    tokenizer = {"_target_": "pipeline.data.tokenizer.BpeTokenizer", "context_length": 8}
    tokenizer["path"] = str(folder / "tokenizer")
    transform = {"_target_": "pipeline.data.images.ImageTransform", "image_size": 8}
    config = {"model": model, "tokenizer": tokenizer, "transform": transform}
    (folder / "proxy" / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "proxy" / "config.yaml")
    torch.manual_seed(0)
    weights = {f"model.{k}": v for k, v in build(model).state_dict().items()}
    torch.save({"state_dict": weights}, folder / "proxy" / "checkpoints" / "step-1.ckpt")
    return folder


def overrides(data, runs, name, *more):
    return [
        f"data.shards={data}/shards",
        f"run={data}/proxy",
        f"name={name}",
        f"runs_dir={runs}",
        "samples_seen=48",
        "global_batch_size=8",
        "schedule.warmup_samples=8",
        "checkpoint_every_steps=2",
        "keep_checkpoints=9",
        "log_every_steps=1",
        "data.workers=0",
        "decoder.width=16",
        "decoder.layers=1",
        "decoder.heads=2",
        "trainer.accelerator=cpu",
        *more,
    ]


def train(data, runs, name, *more):
    cfg = composed("train_captioner", overrides(data, runs, name, *more))
    check(cfg)
    return train_captioner(cfg)


def losses(run):
    return [(row["step"], row["train/loss"]) for row in read_metrics(run)]


def weights(run):
    return torch.load(run / "checkpoints" / "step-00000006.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("runs"), "whole")


def test_continues_bit_identically(data, whole, tmp_path):
    again = tmp_path / "whole"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step-00000002.ckpt", again / "checkpoints")
    train(data, tmp_path, "whole")
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert losses(again) == losses(whole)[2:]
    ours, theirs = weights(again), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_proxys_tower_is_taken_over(data, whole):
    proxy = torch.load(data / "proxy/checkpoints/step-1.ckpt", weights_only=True)["state_dict"]
    towers = {k: v for k, v in proxy.items() if k.startswith("model.image.")}
    assert towers and all(torch.equal(weights(whole)[name], v) for name, v in towers.items())


def test_a_finished_run_captions(whole, make_picture):
    captioner = TrainedCaptioner.load(whole)
    texts, scores = captioner.caption(captioner.pixels([make_picture(0), make_picture(1)]))
    assert len(texts) == 2 and all(score < 0 for score in scores)


def test_a_name_is_one_run(data, whole):
    with pytest.raises(ValueError, match=r"image_drop: was 0\.2, now 0\.5"):
        train(data, whole.parent, "whole", "image_drop=0.5")


def test_bad_input_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="image_drop 2"):
        train(data, tmp_path, "a", "image_drop=2")
    with pytest.raises(ValueError, match="not below samples_seen=48"):
        train(data, tmp_path, "b", "schedule.warmup_samples=48")
    with pytest.raises(ValueError, match="no run directory"):
        train(data, tmp_path, "c", f"run={tmp_path}")


def test_strategies_it_does_not_know_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="ZeroStrategy.*use trainer=ddp"):
        train(data, tmp_path, "pieces", "trainer=deepspeed_2", "trainer.accelerator=cpu")


def test_dropping_does_not_depend_on_the_world_size():
    whole = dropped_images(0, 5, 1000, 0.3)
    assert torch.equal(whole, dropped_images(0, 5, 1000, 0.3))
    assert not torch.equal(whole, dropped_images(0, 6, 1000, 0.3))
    assert abs(int(whole.sum()) - 300) < 60  # 4 sd


def test_the_command(data, tmp_path, root):
    words = overrides(data, tmp_path, "typed", "samples_seen=16")
    command = [sys.executable, "-m", "pipeline.train_captioner", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "typed/checkpoints/step-00000002.ckpt").exists()
