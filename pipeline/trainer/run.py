"""A checked training config -> the objects of a run: directory, identity, resume, table,
trainer.
"""

import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from pipeline.config import build
from pipeline.losses.objective import Objective
from pipeline.tracking.metrics import MetricsFile
from pipeline.trainer.callbacks.progress import PairsProgress
from pipeline.trainer.checkpoints import AtomicCheckpointIO, Checkpoints, find_newest
from pipeline.trainer.module import ContrastiveModule

log = logging.getLogger(__name__)

# What may change when a run is continued: it changes speed or what is seen of the run, not its
# result.
OPERATIONAL = (
    "micro_batch_size",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "recipe_info",
    "runs_dir",
    "trainer",
    "tracking",
    "data.workers",
    "data.shards",  # may have moved; the number of pairs in it is compared with the checkpoint
    "data.verify",
    "data.cache",
    "data.cache_gib",
    "data.max_bad_fraction",
)


def run_directory(cfg: DictConfig) -> Path:
    """runs_dir/name: never a timestamp, each rank would make its own."""
    return Path(cfg.runs_dir) / cfg.name


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """A nested config as {dotted key: value}."""
    if isinstance(node, dict):
        pairs = ((f"{path}.{key}".lstrip("."), value) for key, value in node.items())
        return {name: leaf for p, value in pairs for name, leaf in flat(value, p).items()}
    return {path: node}


def claim(cfg: DictConfig, directory: Path) -> None:
    """Leave the resolved config in the run directory, or compare with the one that is there.

    Raises ValueError when the name belongs to a run with another config; the differing keys are
    listed.
    """
    path, ours = directory / "config.yaml", OmegaConf.to_container(cfg, resolve=True)
    if path.exists():
        theirs, mine = flat(OmegaConf.to_container(OmegaConf.load(path))), flat(ours)
        differing = [
            f"  {key}: was {theirs.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(theirs.keys() | mine.keys())
            if theirs.get(key) != mine.get(key)
            and not any(key == known or key.startswith(known + ".") for known in OPERATIONAL)
        ]
        if differing:
            raise ValueError(
                f"{directory} is a run with another config; give a new name=..., or these values "
                "back:\n" + "\n".join(differing)
            )
        return
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    OmegaConf.save(OmegaConf.create(ours), part)
    os.replace(part, path)


def make_module(cfg: DictConfig) -> ContrastiveModule:
    """The model, objective and optimizer of a run. Weights are a function of `seed`."""
    pl.seed_everything(cfg.seed, verbose=False)
    return ContrastiveModule(
        model=build(cfg.model),
        objective=Objective(terms=build(cfg.loss), weights=dict(cfg.loss_weights)),
        transform=build(cfg.transform),
        image_tokens=build(cfg.image_tokens) if cfg.image_tokens else None,
        text_tokens=build(cfg.text_tokens) if cfg.text_tokens else None,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.schedule),
        samples_seen=cfg.samples_seen,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.micro_batch_size,
        gradient_clip_norm=cfg.gradient_clip_norm,
        log_every_steps=cfg.log_every_steps,
        seed=cfg.seed,
    )


def make_trainer(cfg: DictConfig, directory: Path) -> pl.Trainer:
    """Lightning's Trainer with our callbacks, loggers and checkpoint writing."""
    callbacks = [
        Checkpoints(
            directory=directory / "checkpoints",
            every_steps=cfg.checkpoint_every_steps,
            keep=cfg.keep_checkpoints,
        ),
        PairsProgress(total=cfg.samples_seen, global_batch_size=cfg.global_batch_size),
    ]
    return build(
        cfg.trainer,
        default_root_dir=str(directory),
        max_steps=cfg.samples_seen // cfg.global_batch_size,
        max_epochs=-1,
        callbacks=callbacks,
        logger=[build(node) for node in cfg.tracking.values() if node is not None],
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )


def derived_table(cfg: DictConfig, module: ContrastiveModule, pairs: int, world_size: int) -> Table:
    """What follows from the config, for a look before the hours are spent."""
    local = cfg.global_batch_size // world_size
    micro = cfg.micro_batch_size or local
    tokens = module.model.image.num_tokens
    kept = tokens
    if module.image_tokens is not None:
        kept = module.image_tokens.num_kept(tokens)
    towers = {
        "image tower": module.model.image,
        "text tower": module.model.text,
        "whole model": module.model,
    }
    steps = cfg.samples_seen // cfg.global_batch_size
    seen = steps * cfg.global_batch_size
    rows = {
        "run": f"{run_directory(cfg)}",
        "pairs in the data": f"{pairs:,}",
        "pairs to see": f"{seen:,} = {steps:,} steps x {cfg.global_batch_size:,}",
        "epochs": f"{seen / pairs:.2f}",
        "processes": f"{world_size}, {local:,} pairs each in {-(-local // micro)} x {micro:,}",
        "patches per image": f"{tokens}, {kept} kept in training",
        "text positions": f"{module.model.text.context_length}",
    }
    for name, tower in towers.items():
        count = sum(parameter.numel() for parameter in tower.parameters())
        rows[f"parameters, {name}"] = f"{count / 1e6:.2f} M"
    table = Table(title="the run", title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def train(cfg: DictConfig) -> Path:
    """Train, from the last checkpoint if there is one; returns the run directory."""
    directory = run_directory(cfg)
    claim(cfg, directory)
    module, trainer = make_module(cfg), make_trainer(cfg, directory)
    data = build(cfg.data).for_run(
        transform=module.transform,
        tokenizer=build(cfg.tokenizer),
        global_batch_size=cfg.global_batch_size,
        seed=cfg.seed,
    )
    stream = data.open(rank=trainer.global_rank, world_size=trainer.world_size)
    newest = find_newest(directory / "checkpoints")
    if trainer.is_global_zero:
        Console(stderr=True).print(derived_table(cfg, module, len(stream), trainer.world_size))
        if newest is not None:
            log.info("continuing from %s", newest)
        step = int(newest.stem.split("-")[-1]) if newest is not None else 0
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(step)
        if step >= trainer.max_steps:
            log.info("nothing to do: all %d steps are done", step)
    trainer.fit(module, datamodule=data, ckpt_path=newest, weights_only=True)
    return directory
