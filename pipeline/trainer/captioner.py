"""Train a captioner on a proxy's image tower: the same run directory, resume and metrics as
pipeline.train.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pipeline.config import build
from pipeline.data.images import ImageTransform
from pipeline.data.three_views import ThreeViews
from pipeline.evals.trained import newest_checkpoint, read_weights, run_config
from pipeline.evals.trained_captioner import make_captioner
from pipeline.models.captioner import Captioner
from pipeline.phases import phases
from pipeline.tracking.metrics import MetricsFile
from pipeline.trainer.checkpoints import find_sound, step_of
from pipeline.trainer.identity import claimed
from pipeline.trainer.module import Optimizer, Schedule
from pipeline.trainer.options import refuse_wrong_options
from pipeline.trainer.run import end_if_early, loggers, make_trainer
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy
from pipeline.trainer.strategies.zero import ZeroStrategy

log = logging.getLogger(__name__)


def dropped_images(seed: int, step: int, pairs: int, share: float) -> Tensor:
    """(pairs,) bool for the global batch of a step: the same in any world size."""
    digest = hashlib.blake2b(f"{seed} dropped images {step}".encode(), digest_size=7).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(pairs, generator=source) < share


class CaptionerModule(pl.LightningModule):
    """One optimizer step a batch. Data-parallel: each rank's mean over its own tokens, averaged
    over the ranks; with unequal caption lengths that is not quite the mean over all tokens.
    """

    def __init__(
        self,
        *,
        model: Captioner,
        transform: ImageTransform,
        optimizer: Optimizer,
        schedule: Schedule,
        samples_seen: int,
        global_batch_size: int,
        image_drop: float,
        gradient_clip_norm: float | None,
        log_every_steps: int,
        seed: int,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.transform = model, transform
        self.optimizer, self.schedule = optimizer, schedule
        self.samples_seen, self.global_batch_size = samples_seen, global_batch_size
        self.image_drop, self.gradient_clip_norm = image_drop, gradient_clip_norm
        self.log_every_steps, self.seed = log_every_steps, seed
        self.grad_norm = torch.tensor(0.0)
        self.last_logged: dict[str, float] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer.make(self)

    def forward(self, images: Tensor, tokens: Tensor, dropped: Tensor) -> Tensor:
        return self.model.loss(images, tokens, dropped)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One optimizer step on the local batch of ShardStream."""
        step, local = self.trainer.global_step, len(batch["images"])
        optimizer, done = self.optimizers(), step * self.global_batch_size
        factor = self.schedule.factor(done, self.samples_seen, self.global_batch_size)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        dropped = dropped_images(self.seed, step, self.global_batch_size, self.image_drop)
        start = self.trainer.global_rank * local
        dropped = dropped[start : start + local].to(self.device)
        optimizer.zero_grad()
        loss = self(self.transform.normalise(batch["images"]), batch["tokens"], dropped)
        self.manual_backward(loss)
        optimizer.step()
        step = self.trainer.global_step
        if step % self.log_every_steps == 0 or step in (1, self.trainer.max_steps):
            self.write(loss.item(), self.grad_norm.item(), optimizer.param_groups[0]["lr"], step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Where gradients are unscaled, in every precision.
        limit = math.inf if self.gradient_clip_norm is None else self.gradient_clip_norm
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)

    def write(self, loss: float, grad_norm: float, lr: float, step: int) -> None:
        """One row for every logger. Raises ValueError for a loss that is not finite."""
        row = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
        row["samples_seen"] = step * self.global_batch_size
        self.last_logged = row
        for logger in self.loggers:
            logger.log_metrics(row, step=step)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at {row['samples_seen']} pairs: lower optimizer.lr, or set "
                "gradient_clip_norm=1"
            )


def fill_from_proxy(cfg: DictConfig) -> None:
    """Take over what the config leaves to the proxy: its tower, tokenizer and transform."""
    proxy = run_config(cfg.run, allow_foreign_targets=cfg.allow_foreign_targets)
    for part, node in (
        ("image", proxy.model.image),
        ("tokenizer", proxy.tokenizer),
        ("transform", proxy.transform),
    ):
        if cfg[part] is None:
            cfg[part] = OmegaConf.to_container(node, resolve=True)


def proxy_tower(run: str | Path) -> dict[str, Tensor]:
    """The weights of a proxy's image tower."""
    weights = read_weights(newest_checkpoint(run))
    return {
        name.removeprefix("image."): tensor
        for name, tensor in weights.items()
        if name.startswith("image.")
    }


def make_module(cfg: DictConfig, tokenizer: Any) -> CaptionerModule:
    """The untrained decoder on the proxy's tower. Weights are a function of `seed`."""
    if not 0 <= cfg.image_drop <= 1:
        raise ValueError(f"image_drop {cfg.image_drop}: a fraction in [0, 1]")
    pl.seed_everything(cfg.seed, verbose=False)
    model = make_captioner(cfg, tokenizer)
    try:
        model.image.load_state_dict(proxy_tower(cfg.run))
    except RuntimeError as error:
        raise ValueError(f"the image tower of run={cfg.run} does not fit: {error}") from error
    transform = build(cfg.transform)
    if isinstance(transform, ThreeViews):
        raise ValueError(
            "transform: a captioner reads one crop of an image and three_views, the proxy's, gives "
            f"three: give +transform=clip transform.image_size={transform.image_size}"
        )
    return CaptionerModule(
        model=model,
        transform=transform,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.schedule),
        samples_seen=cfg.samples_seen,
        global_batch_size=cfg.global_batch_size,
        image_drop=cfg.image_drop,
        gradient_clip_norm=cfg.gradient_clip_norm,
        log_every_steps=cfg.log_every_steps,
        seed=cfg.seed,
    )


def train_captioner(cfg: DictConfig) -> Path:
    """Train, from the last sound checkpoint if there is one; returns the run directory."""
    refuse_wrong_options(cfg)
    fill_from_proxy(cfg)
    with claimed(cfg) as (directory, ours):
        train_in(cfg, directory, find_sound(directory / "checkpoints", set_aside=ours))
    return directory


def train_in(cfg: DictConfig, directory: Path, newest: Path | None) -> None:
    """Train in a run directory from a checkpoint of it."""
    tokenizer = build(cfg.tokenizer)
    (phase,) = phases(cfg)
    module, trainer = make_module(cfg, tokenizer), make_trainer(phase, directory, loggers(cfg))
    if isinstance(trainer.strategy, FullyShardedStrategy | ZeroStrategy):
        raise ValueError(
            f"trainer.strategy is {type(trainer.strategy).__name__}, which keeps a captioner in "
            "pieces that its step does not know: use trainer=ddp"
        )
    data = build(cfg.data).for_run(
        transform=module.transform,
        tokenizer=tokenizer,
        phase=phase,
        seed=cfg.seed,
    )
    data.open(rank=trainer.global_rank, world_size=trainer.world_size)
    step = step_of(newest)
    if trainer.is_global_zero:
        parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        log.info("captioner: %.2f M parameters are trained", parameters / 1e6)
        if newest is not None:
            log.info("continuing from %s", newest)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(step)
    if step >= trainer.max_steps:
        log.info("nothing to do: all %d steps are done", step)
    trainer.fit(module, datamodule=data, ckpt_path=newest, weights_only=True)
    end_if_early(trainer, begun=step)
