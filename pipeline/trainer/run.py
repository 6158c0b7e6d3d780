"""A checked training config -> the objects of a run: directory, identity, resume, table,
trainer.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from pipeline.config import build
from pipeline.losses.objective import Objective
from pipeline.models.freeze import freeze
from pipeline.models.without_weights import without_weights
from pipeline.optim.groups import describe
from pipeline.phases import Phase, phases
from pipeline.shards import write_atomically
from pipeline.tracking.metrics import MetricsFile
from pipeline.trainer.attentive import module_class
from pipeline.trainer.callbacks.preemption import TEMPORARY_FAILURE
from pipeline.trainer.callbacks.progress import PairsProgress
from pipeline.trainer.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    find_sound,
    newest_of,
    step_of,
)
from pipeline.trainer.identity import claimed, resolved
from pipeline.trainer.module import ContrastiveModule
from pipeline.trainer.options import refuse_wrong_options
from pipeline.trainer.rehearsal import rehearse
from pipeline.trainer.strategies.adapter import refuse_wrong_trainer
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy

log = logging.getLogger(__name__)


def first_model(cfg: DictConfig, *, fresh: bool) -> nn.Module:
    """Weights are a function of `seed`, and, where a fresh run has an `init`, of what it reads."""
    pl.seed_everything(cfg.seed, verbose=False)
    model = build(cfg.model)
    if fresh and cfg.init:
        log.info("init: %s", build(cfg.init).apply(model))
    return model


def make_module(phase: Phase, *, fresh: bool, in_pieces: bool = False) -> ContrastiveModule:
    """The model, objective and optimizer of a phase.

    in_pieces: the strategy fills a model without weights, so that no process but one ever holds it
    whole, and none where a checkpoint is loaded (fresh=False).
    """
    cfg = phase.config
    if in_pieces:
        pl.seed_everything(cfg.seed, verbose=False)
        with without_weights():
            model = build(cfg.model)
    else:
        model = first_model(cfg, fresh=fresh)
    freeze(model, cfg.frozen)
    transform = build(cfg.transform)
    image_tokens = build(cfg.image_tokens) if cfg.image_tokens else None
    return module_class(model, transform, image_tokens)(
        model=model,
        objective=Objective(terms=build(cfg.loss), weights=dict(cfg.loss_weights)),
        transform=transform,
        image_tokens=image_tokens,
        text_tokens=build(cfg.text_tokens) if cfg.text_tokens else None,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.schedule),
        phase=phase,
        micro_batch_size=cfg.micro_batch_size,
        gradient_clip_norm=cfg.gradient_clip_norm,
        log_every_steps=cfg.log_every_steps,
        seed=cfg.seed,
        optimizer_state=cfg.optimizer_state,
        max_skipped_steps=cfg.max_skipped_steps,
        compile_towers=cfg.compile_towers,
        first_weights=partial(first_model, cfg, fresh=True) if in_pieces and fresh else None,
    )


def loggers(cfg: DictConfig) -> list[Logger]:
    """Once a run: its phases go into the same files."""
    return [build(node) for node in cfg.tracking.values() if node is not None]


def cluster() -> list[SLURMEnvironment]:
    """Under srun: SLURM's ranks without Lightning's requeueing, which writes a checkpoint in the
    middle of a step (callbacks/preemption.py waits for its end).
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def make_trainer(phase: Phase, directory: Path, logger: list[Logger]) -> pl.Trainer:
    """Lightning's Trainer with our callbacks, loggers and checkpoint writing. Steps are counted
    through all phases.
    """
    cfg = phase.config
    callbacks = [
        # before the checkpoints, which hold what they know
        *([build(cfg.ema)] if cfg.get("ema") else []),
        *[build(node) for node in cfg.callbacks.values() if node is not None],
        Checkpoints(
            directory=directory / "checkpoints",
            every_steps=cfg.checkpoint_every_steps,
            keep=cfg.keep_checkpoints,
        ),
        PairsProgress(
            first_step=phase.first_step,
            global_batch_size=cfg.global_batch_size,
            name=phase.name or "train",
        ),
    ]
    options = {
        "default_root_dir": str(directory),
        "max_steps": phase.end_step,
        "max_epochs": -1,
        "callbacks": callbacks,
        "logger": logger,
        "plugins": [AtomicCheckpointIO(), *cluster()],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    try:
        trainer = build(cfg.trainer, **options)
    except InstantiationException as error:  # what Lightning says to a wrong combination
        raise ValueError(f"trainer: {error.__cause__}") from error
    refuse_wrong_trainer(trainer, cfg.trainer.get("precision"))
    return trainer


def derived(phase: Phase, module: ContrastiveModule, pairs: int, world_size: int) -> dict[str, str]:
    """What follows from a phase's config."""
    cfg, model = phase.config, module.model
    local = cfg.global_batch_size // world_size
    micro = cfg.micro_batch_size or local
    tokens = kept = model.image.num_tokens
    if module.image_tokens is not None:
        kept = module.image_tokens.num_kept(tokens)
    rows = {
        "pairs in the data": f"{pairs:,}",
        "pairs to see": f"{phase.samples:,} = {phase.steps:,} steps x {cfg.global_batch_size:,}",
        "epochs": f"{phase.samples / pairs:.2f}",
        "processes": f"{world_size}, {local:,} pairs each in {-(-local // micro)} x {micro:,}",
        "image size": f"{model.image.image_size}",
        "patches per image": f"{tokens}, {kept} kept in training",
        "text positions": f"{model.text.context_length}",
    }
    towers = {"image tower": model.image, "text tower": model.text, "whole model": model}
    for name, tower in towers.items():
        counts = [p.numel() for p in tower.parameters()]
        learning = sum(p.numel() for p in tower.parameters() if p.requires_grad)
        still = f", {learning / 1e6:.2f} M learn" if learning < sum(counts) else ""
        rows[f"parameters, {name}"] = f"{sum(counts) / 1e6:.2f} M{still}"
    return rows


def derived_table(title: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """A column for each phase, for a look before the hours are spent."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    table.add_column()
    for name in columns:
        table.add_column(name)
    for row in next(iter(columns.values())):
        table.add_row(row, *(rows[row] for rows in columns.values()))
    return table


def groups_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each learning rate and weight decay; tensors counted by the part of the model."""
    table = Table(title="learning rates; names in optimizer.txt", title_justify="left")
    for column in ("lr", "weight decay", "parameters", "tensors"):
        table.add_column(column, justify="left" if column == "tensors" else "right")
    for group, row in zip(groups, describe(groups), strict=True):
        parts = Counter(name.removeprefix("model.").split(".")[0] for name in group["names"])
        tensors = ", ".join(f"{part} {count}" for part, count in parts.items())
        table.add_row(row["lr"], row["weight decay"], row["parameters"], tensors)
    return table


def groups_text(groups: Sequence[Mapping[str, Any]]) -> str:
    """The same in full: which parameters have which rate, and which are not decayed."""
    rows = describe(groups)
    return "".join(
        f"lr {row['lr']}, weight decay {row['weight decay']}: {row['tensors']} tensors, "
        f"{row['parameters']} parameters\n  " + row["names"].replace(", ", "\n  ") + "\n"
        for row in rows
    )


def train_phase(phase: Phase, directory: Path, logger: list[Logger], newest: Path | None) -> None:
    """Train one phase to its end, from a checkpoint of it or of the phase before."""
    cfg = phase.config
    torch.set_float32_matmul_precision(cfg.get("float32_matmul_precision", "highest"))
    trainer = make_trainer(phase, directory, logger)
    in_pieces = isinstance(trainer.strategy, FullyShardedStrategy)
    module = make_module(phase, fresh=newest is None, in_pieces=in_pieces)
    data = build(cfg.data).for_run(
        transform=module.transform, tokenizer=build(cfg.tokenizer), phase=phase, seed=cfg.seed
    )
    stream = data.open(rank=trainer.global_rank, world_size=trainer.world_size)
    if trainer.is_global_zero:
        rows = derived(phase, module, len(stream), trainer.world_size)
        console = Console(stderr=True)
        console.print(derived_table(f"{directory}", {phase.name: rows}))
        groups = module.configure_optimizers().param_groups
        console.print(groups_table(groups))
        write_atomically(directory / "optimizer.txt", groups_text(groups).encode())
        if newest is not None:
            log.info("continuing from %s", newest)
        for one in logger:
            if isinstance(one, MetricsFile):
                one.rewind(step_of(newest))
    trainer.fit(module, datamodule=data, ckpt_path=newest, weights_only=True)
    end_if_early(trainer, begun=step_of(newest))


def end_if_early(trainer: pl.Trainer, *, begun: int) -> None:
    """Raises SystemExit on all ranks, rank 0 with code 75, where training ended before its last
    step: by trainer.max_time, or a callback that stops the trainer.

    begun: the step it went on from. Raises ValueError where it did none: a scheduler would start
    the same command for ever.
    """
    if trainer.global_step >= trainer.max_steps:
        return
    if trainer.global_step == begun:
        raise ValueError(
            f"stopped before step {begun + 1} of {trainer.max_steps}: trainer.max_time counts all "
            "lives of a run and is used up, raise it or leave it out (or a callback stopped it)"
        )
    if trainer.is_global_zero:
        log.warning(
            "stopped after step %d of %d, by trainer.max_time (which counts all lives of a run) or "
            "a callback; %s is written, the same command with more time goes on (exit code %d)",
            trainer.global_step,
            trainer.max_steps,
            newest_of(trainer),
            TEMPORARY_FAILURE,
        )
    raise SystemExit(TEMPORARY_FAILURE if trainer.is_global_zero else 0)


def train(cfg: DictConfig) -> Path:
    """Train, from the last sound checkpoint if there is one; returns the run directory."""
    refuse_wrong_options(cfg)
    rehearse(cfg)
    with claimed(cfg) as (directory, ours):
        logger, plan = loggers(cfg), phases(cfg)
        for one in logger:
            one.log_hyperparams(resolved(cfg))
        for phase in plan:
            newest = find_sound(directory / "checkpoints", set_aside=ours)
            if step_of(newest) < phase.end_step:
                train_phase(phase, directory, logger, newest)
            elif phase is plan[-1]:
                log.info("nothing to do: all %d steps are done", phase.end_step)
    return directory
