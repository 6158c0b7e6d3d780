"""Short real runs on every strategy, one after another in the same two processes."""

import logging
import os
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipeline.check import composed
from pipeline.config import build, check
from pipeline.losses.features import PairFeatures
from pipeline.phases import phases
from pipeline.trainer.checkpoints import find_newest
from pipeline.trainer.identity import claim, run_directory
from pipeline.trainer.run import loggers, make_module, make_trainer, train
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy

WORDS = {
    "ddp": ["trainer=ddp"],
    "fsdp": ["trainer=fsdp"],
    "deepspeed_0": ["trainer=deepspeed_1", "trainer.strategy.stage=0"],
    "deepspeed_1": ["trainer=deepspeed_1"],
    "deepspeed_2": ["trainer=deepspeed_2"],
    "deepspeed_3": ["trainer=deepspeed_3"],
    "deepspeed_2_offload": ["trainer=deepspeed_2", "trainer.strategy.offload=true"],
    "deepspeed_3_offload": ["trainer=deepspeed_3", "trainer.strategy.offload=true"],
}
LEG = 2  # steps of each strategy


def config_of(data: Path, runs: Path, name: str, steps: int, words: list[str]) -> Any:
    """Steps of two processes: uneven micro-batches, clipping that bites, dropped tokens."""
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
            f"samples_seen={32 * steps}",
            f"checkpoint_every_steps={LEG}",
            "keep_checkpoints=100",
            "micro_batch_size=7",
            "gradient_clip_norm=0.5",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
            *words,
        ],
    )
    check(cfg, world_size=2)
    return cfg


class Faulty(nn.Module):
    """A term that is not a number in some steps (from 1) of one rank, and nothing in the others."""

    def __init__(self, *, rank: int, steps: Sequence[int]) -> None:
        super().__init__()
        self.rank, self.steps, self.step = rank, steps, 0

    def forward(self, features: PairFeatures) -> Tensor:
        self.step += 1
        faulty = self.step in self.steps and features.peers.rank == self.rank
        return features.image_embed.sum() * (float("nan") if faulty else 0.0)


class SaveAtOnce(pl.Callback):
    """What a checkpoint holds right after it was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            trainer.save_checkpoint(self.path)


class Unlucky(pl.Callback):
    """A rank's data come late and with so many bad records: of the second, and twice as many."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, _: int) -> None:
        batch["bad"] = trainer.global_rank + 1
        pl_module.mark -= 1000 * trainer.global_rank


class StopAt(pl.Callback):
    """A run that ends early, as one that is continued elsewhere."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def run(cfg: Any, *callbacks: pl.Callback) -> None:
    """`pipeline.trainer.run.train` of a run without phases, with more callbacks."""
    directory = run_directory(cfg)
    claim(cfg, directory)
    newest = find_newest(directory / "checkpoints")
    (phase,) = phases(cfg)
    trainer = make_trainer(phase, directory, loggers(cfg))
    in_pieces = isinstance(trainer.strategy, FullyShardedStrategy)
    module = make_module(phase, fresh=newest is None, in_pieces=in_pieces)
    trainer.callbacks.extend(callbacks)
    data = build(cfg.data).for_run(
        transform=module.transform, tokenizer=build(cfg.tokenizer), phase=phase, seed=cfg.seed
    )
    trainer.fit(module, datamodule=data, ckpt_path=newest, weights_only=True)


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
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def relay(
    index: int,
    port: str,
    data: Path,
    runs: Path,
    strategies: list[str],
    faulty: list[str],
    more: list[str],
) -> None:
    """One run that every strategy continues for two steps; the same under DDP alone; and runs with
    two faulty steps. more: words of all runs.
    """
    launched(index, port)
    steps = LEG * len(strategies)
    for leg, name in enumerate(strategies):
        cfg = config_of(data, runs, "relay", steps, [*WORDS[name], *more])
        at_once = SaveAtOnce(runs / f"at_once-{leg * LEG}.ckpt")
        run(cfg, StopAt((leg + 1) * LEG), at_once, Unlucky())
    run(config_of(data, runs, "ddp", steps, [*WORDS["ddp"], *more]))
    for name in faulty:
        words = [*WORDS[name], *more, "checkpoint_every_steps=1", *fault(rank=1, steps=[2, 3])]
        run(config_of(data, runs, f"faulty_{name}", 4, words))


HALF = {name: WORDS[name] for name in ("ddp", "fsdp", *(f"deepspeed_{n}" for n in (1, 2, 3)))}


def in_half_precision(index: int, port: str, data: Path, runs: Path) -> None:
    """Six steps of every strategy under bf16-mixed, in micro-batches, whole, and in two runs; and
    DDP's in float32.
    """
    launched(index, port)
    run(config_of(data, runs, "float32", 6, WORDS["ddp"]))
    for name, words in HALF.items():
        words = [*words, "trainer.precision=bf16-mixed"]
        run(config_of(data, runs, f"half_{name}", 6, words))
        run(config_of(data, runs, f"half_{name}_whole", 6, [*words, "micro_batch_size=null"]))
        for callbacks in ([StopAt(LEG)], []):
            run(config_of(data, runs, f"half_{name}_resumed", 6, words), *callbacks)


def kept_in_checkpoints(index: int, port: str, data: Path, runs: Path) -> None:
    """Runs of one process: a frozen tower, a loss scale, a phase without the moments of before."""
    launched(index, port)
    one = ["trainer.devices=1"]
    for name in ("deepspeed_2", "deepspeed_3"):
        words = [*WORDS[name], *one, "trainer.precision=bf16-mixed", "frozen=[image.*]"]
        for end in (LEG, 2 * LEG):
            run(config_of(data, runs, f"frozen_{name}", 2 * LEG, words), StopAt(end))
        words = [*WORDS[name], *one, "trainer.precision=16-mixed"]
        run(config_of(data, runs, f"float16_{name}", 6, words))
        for end in (4, 6):
            run(config_of(data, runs, f"float16_{name}_resumed", 6, words), StopAt(end))
    for name in ("fsdp", "deepspeed_2"):
        words = [*WORDS[name], *one, *PHASES, "+phases.large.optimizer_state=reset"]
        train(config_of(data, runs, f"reset_{name}", 4, words))


PHASES = [
    "every_phase=null",  # of debug=tiny: these have their own sizes
    "samples_seen=???",
    "+phases.small.samples_seen=64",
    "+phases.small.schedule.warmup_samples=32",
    "+phases.small.model.image.image_size=16",
    "+phases.small.frozen=[text.*]",
    "+phases.large.samples_seen=64",
    "+phases.large.schedule.warmup_samples=32",
]


def phased(index: int, port: str, data: Path, runs: Path, strategies: list[str]) -> None:
    """Two phases under each strategy, the first with a frozen tower and small pictures; weights are
    averaged where a strategy can.
    """
    launched(index, port)
    for name in strategies:
        ema = [] if name == "deepspeed_3" else ["ema=constant", "ema.decay=0.5"]
        train(config_of(data, runs, f"phased_{name}", 4, [*WORDS[name], *PHASES, *ema]))


def fault(*, rank: int, steps: list[int]) -> list[str]:
    """The words that add `Faulty` to a run's loss."""
    term = f"_target_:{Faulty.__module__}.Faulty,rank:{rank},steps:{steps}"
    return [f"+loss.faulty={{{term}}}", "allow_foreign_targets=true"]
