"""16-mixed through Lightning's own plugin, with a loss scale on the CPU.

Gradients are unscaled where they are clipped, an overflow is a skipped step that halves the scale,
and a resumed run has it.
"""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import open_dict

from pipeline.optim.adamw import AdamW
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer import run
from pipeline.trainer.checkpoints import find_newest
from tests.optim.small_model import tiny
from tests.trainer import strategy_runs as runs


@pytest.fixture
def float16(data, tmp_path, monkeypatch):
    """float16(name, *words, scale, end): metrics and checkpoints of a run of three steps."""

    def start(name, *words, scale, end=3):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        monkeypatch.setattr(run, "cluster", lambda: [plugin])
        words = ["trainer.devices=1", "micro_batch_size=16", "checkpoint_every_steps=1", *words]
        cfg = runs.config_of(data, tmp_path, name, 3, words)
        with open_dict(cfg):
            del cfg.trainer["precision"]
        runs.run(cfg, runs.StopAt(end))
        folder = tmp_path / name / "checkpoints"
        saved = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))]
        return read_metrics(tmp_path / name), saved

    return start


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_are_unscaled_before_they_are_clipped(float16, optimizer):
    small, large = (
        float16(f"scale-{scale}", f"optimizer={optimizer}", scale=scale)[0]
        for scale in (1.0, 1024.0)
    )
    for one, other in zip(small, large, strict=True):
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=2e-2)
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


def test_an_overflow_is_skipped_counted_and_halves_the_scale(float16):
    rows, saved = float16("overflow", scale=2.0**40)
    assert [row["train/skipped_steps"] for row in rows] == [1, 2, 3]
    assert [c["MixedPrecision"]["scale"] for c in saved] == [2.0**39, 2.0**38, 2.0**37]
    one, last = saved[0]["state_dict"], saved[-1]["state_dict"]
    assert all(torch.equal(one[name], last[name]) for name in one)


def test_the_loss_scale_goes_on(float16, tmp_path):
    whole, _ = float16("whole", scale=2.0**14)
    float16("resumed", scale=2.0**14, end=2)
    resumed, saved = float16("resumed", scale=1.0)
    assert [row["train/loss"] for row in resumed] == [row["train/loss"] for row in whole]
    assert saved[-1]["MixedPrecision"]["scale"] == 2.0**14
    ours, theirs = (
        torch.load(find_newest(tmp_path / name / "checkpoints"), weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_optimizer_of_ours_unscales_by_itself():
    assert not AdamW(lr=1e-3, fused=True).make(tiny())._step_supports_amp_scaling
