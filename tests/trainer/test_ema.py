"""The moving average beside a run: in step with the optimizer, in the checkpoint."""

import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.check import composed
from pipeline.config import check
from pipeline.models.clip import CLIP
from pipeline.models.resize import resize_positions
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.optim.adamw import AdamW
from pipeline.phases import phases
from pipeline.trainer.callbacks.ema import Ema
from pipeline.trainer.checkpoints import AtomicCheckpointIO, Checkpoints
from pipeline.trainer.run import make_trainer

STEPS = 6


class Regression(pl.LightningModule):
    """A model that moves, with weights kept after every optimizer step; some batches are skipped.
    The scale is clamped after the step, as training clamps the logit scale.
    """

    def __init__(self, skip: tuple[int, ...] = (), freeze: bool = False):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"image": nn.Linear(4, 2), "text": nn.Linear(4, 2)})
        self.model["image"].requires_grad_(not freeze)
        self.skip, self.history = skip, []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW(lr=0.1).make(self)

    def training_step(self, batch: Tensor, index: int) -> None:
        if index in self.skip:
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.model["image"](batch) - self.model["text"](batch)).exp().mean())
        optimizer.step()
        with torch.no_grad():
            self.model["text"].bias.clamp_(-0.05, 0.05)
        self.history.append({n: p.detach().clone() for n, p in self.model.named_parameters()})


def batches() -> list[Tensor]:
    return list(torch.randn(STEPS, 3, 4, generator=torch.Generator().manual_seed(1)))


def fit(
    module: pl.LightningModule,
    ema: Ema,
    directory: Path,
    steps: int = STEPS,
    data: slice = slice(None),
    resume: Path | None = None,
) -> None:
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[ema, Checkpoints(directory=directory, every_steps=1, keep=STEPS)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=directory,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches()[data], batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)


def expected(module: Regression, first: dict[str, Tensor], decays: list[float]) -> dict:
    average = {name: weight.double() for name, weight in first.items()}
    for weights, decay in zip(module.history, decays, strict=True):
        average = {n: decay * average[n] + (1 - decay) * weights[n] for n in average}
    return average


@pytest.mark.parametrize("final", [None, 1.0])
def test_an_average_of_the_weights_after_each_step(tmp_path: Path, final: float | None) -> None:
    module, ema = Regression(skip=(2, 3)), Ema(decay=0.5, final_decay=final)
    decays = [0.5 if final is None else 0.75 - 0.25 * math.cos(math.pi * k / 4) for k in range(4)]
    first = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    fit(module, ema, tmp_path, steps=4)
    assert len(module.history) == 4  # two of six batches were skipped, and not averaged
    for name, average in expected(module, first, decays).items():
        torch.testing.assert_close(
            ema.average.weights[name].double(), average, rtol=1e-6, atol=1e-7
        )


def test_a_resumed_average_is_bit_identical(tmp_path: Path) -> None:
    options = {"decay": 0.5, "final_decay": 1.0}
    whole = Ema(**options)
    fit(Regression(), whole, tmp_path)
    saved = tmp_path / "step-00000003.ckpt"
    content = torch.load(saved, weights_only=True)["callbacks"]["Ema"]
    assert content["step"] == 3 and set(content["weights"]) == set(whole.average.weights)
    resumed = Ema(**options)
    fit(Regression(), resumed, tmp_path / "again", data=slice(3, None), resume=saved)
    assert resumed.step == whole.step == STEPS
    for name, average in whole.average.weights.items():
        assert torch.equal(resumed.average.weights[name], average)
    newest = torch.load(tmp_path / f"step-{STEPS:08d}.ckpt", weights_only=True)
    trained = newest["state_dict"]
    kept = newest["callbacks"]["Ema"]["weights"]
    assert not torch.equal(kept["image.weight"], trained["model.image.weight"])
    assert {f"model.{name}" for name in kept} == set(trained)


def test_frozen_parameters_join_when_they_are_trained(tmp_path: Path) -> None:
    module, ema = Regression(freeze=True), Ema(decay=0.5)
    fit(module, ema, tmp_path, steps=2)
    assert set(ema.average.weights) == {"text.weight", "text.bias"}
    module.model["image"].requires_grad_(requires_grad=True)
    module.model["text"].requires_grad_(requires_grad=False)
    moved = module.model["image"].weight.detach() + 1
    ema.step = 0
    with torch.no_grad():
        module.model["image"].weight.copy_(moved)
    trainer = SimpleNamespace(global_step=1, max_steps=2, callbacks=[ema])
    ema.on_train_batch_end(trainer, module)
    assert set(ema.average.weights) == set(dict(module.model.named_parameters()))
    assert torch.equal(ema.average.weights["image.weight"], moved)


def test_averaged_positions_are_resized_as_the_weights_are() -> None:
    """What the next phase's module finds in the checkpoint of the phase before."""
    small, large = (
        CLIP(
            image=VisionTransformer(image_size=size, patch_size=4, width=8, layers=1, heads=1),
            text=TextTransformer(vocab_size=9, context_length=5, width=8, layers=1, heads=1),
            embed_dim=4,
        )
        for size in (8, 16)
    )
    before, ema = Ema(decay=0.5), Ema(decay=0.5)
    trainer = SimpleNamespace(global_step=0, max_steps=2)
    before.on_train_start(trainer, SimpleNamespace(model=small))
    ema.load_state_dict(before.state_dict())
    ema.on_train_start(trainer, SimpleNamespace(model=large))
    expected, changes = resize_positions(small.state_dict(), large)
    assert changes == {"image.position": (5, 17)}
    assert set(ema.average.weights) == set(expected)
    for name, average in ema.average.weights.items():
        assert torch.equal(average, expected[name]), name


def test_a_resized_parameter_starts_anew() -> None:
    module, ema = Regression(), Ema(decay=0.5)
    trainer = SimpleNamespace(global_step=0, max_steps=2, callbacks=[ema])
    ema.on_train_start(trainer, module)
    module.model["text"] = nn.Linear(6, 2)
    trainer.global_step = 1
    ema.on_train_batch_end(trainer, module)
    assert torch.equal(ema.average.weights["text.weight"], module.model["text"].weight)


def test_checkpoints_come_after_it(tmp_path: Path) -> None:
    ema, checkpoints = Ema(decay=0.5), Checkpoints(directory=tmp_path, every_steps=1, keep=1)
    with pytest.raises(AssertionError, match="before Checkpoints"):
        ema.setup(SimpleNamespace(callbacks=[checkpoints, ema]), Regression(), "fit")


def test_a_run_averages_what_its_checkpoints_hold(tmp_path: Path) -> None:
    given = ["recipe=emoji", "debug=tiny", "name=x", "data.shards=y", "tokenizer.path=z"]
    cfg = composed("train", [*given, "ema=cosine"])
    check(cfg)
    kinds = [type(c) for c in make_trainer(phases(cfg)[0], tmp_path, []).callbacks]
    assert kinds.index(Ema) < kinds.index(Checkpoints)
    without = make_trainer(phases(composed("train", given))[0], tmp_path, []).callbacks
    assert Ema not in [type(callback) for callback in without]


def test_averages_of_another_model_are_refused() -> None:
    ema = Ema(decay=0.5)
    ema.load_state_dict({"step": 1, "weights": {"visual.proj": torch.zeros(2)}})
    with pytest.raises(ValueError, match="averages visual.proj, which the model does not have"):
        ema.on_train_start(SimpleNamespace(global_step=1, max_steps=2), Regression())
