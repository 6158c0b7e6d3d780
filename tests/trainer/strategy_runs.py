"""Short real runs on every strategy, one after another in the same two processes."""

import os
import socket
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from pipeline.check import composed
from pipeline.config import build, check
from pipeline.phases import phases
from pipeline.trainer.run import claim, loggers, make_module, make_trainer, run_directory

WORDS = {
    "ddp": ["trainer=ddp"],
    "fsdp": ["trainer=fsdp"],
    "deepspeed_0": ["trainer=deepspeed_1", "trainer.strategy.stage=0"],
    "deepspeed_1": ["trainer=deepspeed_1"],
    "deepspeed_2": ["trainer=deepspeed_2"],
    "deepspeed_3": ["trainer=deepspeed_3"],
}
STEPS, MIDDLE = 4, 2


def config_of(data: Path, runs: Path, name: str, words: list[str]) -> Any:
    """Four steps of two processes: uneven micro-batches, clipping that bites, dropped tokens."""
    cfg = composed(
        "train",
        [
            "recipe=emoji",
            "debug=tiny",
            f"name={name}",
            f"runs_dir={runs}",
            f"data.shards={data}/shards",
            f"tokenizer.path={data}/tokenizer",
            "model.text.vocab_size=600",
            f"samples_seen={32 * STEPS}",
            f"checkpoint_every_steps={MIDDLE}",
            "keep_checkpoints=10",
            "micro_batch_size=7",
            "gradient_clip_norm=0.5",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
            *words,
        ],
    )
    check(cfg, world_size=2)
    return cfg


class SaveAtOnce(pl.Callback):
    """What a checkpoint holds right after it was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def run(cfg: Any, *, start: Path | None = None, callbacks: tuple[pl.Callback, ...] = ()) -> None:
    """`pipeline.trainer.run.train`, with more callbacks and from a checkpoint of another run."""
    directory = run_directory(cfg)
    claim(cfg, directory)
    (phase,) = phases(cfg)
    module = make_module(phase, fresh=start is None)
    trainer = make_trainer(phase, directory, loggers(cfg))
    trainer.callbacks.extend([*callbacks, SaveAtOnce(directory / "at_once.ckpt")])
    data = build(cfg.data).for_run(
        transform=module.transform, tokenizer=build(cfg.tokenizer), phase=phase, seed=cfg.seed
    )
    trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(index: int, port: str) -> None:
    """The environment of a process that something else than Lightning started."""
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(index),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
    }


def every_strategy(index: int, port: str, data: Path, runs: Path) -> None:
    """From scratch; from the middle of DDP's run; and DDP from the middle of theirs."""
    launched(index, port)
    for name, words in WORDS.items():
        run(config_of(data, runs, name, words))
    for name, words in WORDS.items():
        if name == "ddp":
            continue
        start = runs / "ddp" / "checkpoints" / f"step-{MIDDLE:08d}.ckpt"
        run(config_of(data, runs, f"ddp_to_{name}", words), start=start)
        start = runs / name / "checkpoints" / f"step-{MIDDLE:08d}.ckpt"
        run(config_of(data, runs, f"{name}_to_ddp", WORDS["ddp"]), start=start)
