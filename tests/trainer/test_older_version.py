"""A run that an older version began: what it did not write has what is now the default."""

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.check import composed
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.identity import claim

# written by later versions than the first
KEYS_OF_CONFIG = (
    "allow_foreign_targets",
    "callbacks",
    "init",
    "ema",
    "max_skipped_steps",
    "frozen",
    "float32_matmul_precision",
)
KEYS_OF_CHECKPOINT = ("phase", "skipped_steps", "bad_records", "callbacks")


def test_it_goes_on_to_the_same_weights(data, tmp_path, train):
    train(data, tmp_path, "a")
    run = tmp_path / "a"
    older, newest = sorted((run / "checkpoints").glob("*.ckpt"))
    whole = torch.load(newest, weights_only=True)["state_dict"]
    losses = [row["train/loss"] for row in read_metrics(run)]
    newest.unlink()

    content = torch.load(older, weights_only=True)
    for key in KEYS_OF_CHECKPOINT:
        assert content.pop(key, None) is not None, key
    torch.save(content, older)
    config = OmegaConf.load(run / "config.yaml")
    for key in KEYS_OF_CONFIG:
        del config[key]
    del config.transform.mean, config.transform.std
    OmegaConf.save(config, run / "config.yaml")

    done = train(data, tmp_path, "a")
    assert f"continuing from {older}" in done.stderr
    assert [row["train/loss"] for row in read_metrics(run)] == losses
    again = torch.load(newest, weights_only=True)["state_dict"]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_of_phases_goes_on_too(data, tmp_path, command):
    """Also one with a value that every phase overrules, which is refused today and read by none."""
    words = [
        *command(data, tmp_path, "a")[3:],
        "every_phase=null",
        *(f"+phases.{n}.samples_seen=64" for n in "ab"),
        *(f"+phases.{n}.schedule.warmup_samples=32" for n in "ab"),
    ]
    cfg = composed("train", words)
    claim(cfg, tmp_path)
    kept = OmegaConf.load(tmp_path / "config.yaml")
    for node in (kept, kept.phases.a, kept.phases.b):
        del node.float32_matmul_precision, node.transform.mean
    kept.schedule.warmup_samples = 48
    OmegaConf.save(kept, tmp_path / "config.yaml")
    claim(cfg, tmp_path)
    kept.phases.b.schedule.warmup_samples = 48
    OmegaConf.save(kept, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"phases\.b\.schedule\.warmup_samples: was 48, now 32"):
        claim(cfg, tmp_path)


def test_other_pixel_statistics_are_another_run(data, tmp_path, command):
    """An older run's config lacks them: they were the constructor's."""
    words = command(data, tmp_path, "a")[3:]
    cfg = composed("train", words)
    claim(cfg, tmp_path)
    kept = OmegaConf.load(tmp_path / "config.yaml")
    del kept.transform.mean, kept.transform.std
    OmegaConf.save(kept, tmp_path / "config.yaml")
    claim(cfg, tmp_path)
    with pytest.raises(ValueError, match=r"transform\.std: was \[0\.268\S+, .*\], now \[0\.5, 0"):
        claim(composed("train", [*words, "transform.std=[0.5,0.5,0.5]"]), tmp_path)
