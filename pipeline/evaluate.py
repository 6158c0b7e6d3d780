"""COMMAND: numbers of a trained run.

    clip-eval run=runs/demo eval=emoji                   # or python -m pipeline.evaluate
    clip-eval run=runs/demo eval=emoji devices=8         # the same numbers, sooner
    clip-eval run=runs/demo eval=emoji features=DIR      # embeds only what is new
    clip-eval run=runs/demo eval=emoji track=evaluation  # and in W&B

Each process embeds its share; srun and torchrun may have started them. Prints a table, writes
<run>/eval/<task>.json (or out=DIR; <task>.ema.json for weights=ema) and returns
{"eval/<task>/<metric>": x}.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from pipeline.command import entry
from pipeline.config import build, check
from pipeline.distributed import barrier, rank
from pipeline.evals.bootstrap import Estimate
from pipeline.evals.remembered import Remembered
from pipeline.evals.task import run_task
from pipeline.evals.trained import TrainedClip
from pipeline.shards import write_json

log = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> dict[str, float]:
    """Run the tasks of a checked config, one after the other, keeping each result at once."""
    out = Path(config.out or Path(config.run) / "eval")
    tasks = {name: build(node) for name, node in config.eval.items()}
    if not tasks:
        raise ValueError("no tasks: give eval=NAME, one of conf/eval")
    device = processes(config)
    track = build(config.track) if config.track else None
    trained = TrainedClip.load(
        config.run,
        checkpoint=config.checkpoint,
        weights=config.weights,
        device=device,
        allow_foreign_targets=config.allow_foreign_targets,
    )
    embedder = Remembered(trained, directory=config.features)
    numbers: dict[str, float] = {}
    for name, task in tasks.items():
        log.info("%s of %s", name, trained.checkpoint)
        found = run_task(name, task, embedder)
        embedder.keep()
        if rank() == 0:
            kind = "" if config.weights == "trained" else f".{config.weights}"
            write_json(out / f"{name}{kind}.json", results(trained, config.weights, found))
        numbers |= found
    if track is not None and rank() == 0:
        track.log(Path(config.run), trained.checkpoint, numbers, weights=config.weights)
    barrier()  # the launcher ends the others with the first
    return numbers


def processes(config: DictConfig) -> torch.device:
    """Start the processes, or join those of srun or torchrun; the device of this one."""
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy="ddp" if config.devices * config.num_nodes > 1 else "auto",
    )
    fabric.launch()
    return fabric.device


def results(trained: TrainedClip, weights: str, found: dict[str, float]) -> dict[str, Any]:
    """What is kept of a task's numbers: the 95 % intervals apart, where there are some."""
    spans = {key: [v.low, v.high] for key, v in found.items() if isinstance(v, Estimate)}
    made_by = {"checkpoint": str(trained.checkpoint), "weights": weights}
    return {**made_by, "metrics": found, "intervals": spans}


def table(numbers: dict[str, float], *, title: str) -> Table:
    """A row a metric."""
    shown = Table(title=title)
    for column in ("task", "metric"):
        shown.add_column(column)
    for column in ("value", "95 % interval"):
        shown.add_column(column, justify="right")
    for key, value in numbers.items():
        _, task, metric = key.split("/", 2)
        span = f"{value.low:.4f} to {value.high:.4f}" if isinstance(value, Estimate) else ""
        shown.add_row(task, metric, f"{value:.4f}", span)
    return shown


@entry("clip-eval", config="evaluate", choices="eval")
def main(config: DictConfig) -> dict[str, float]:
    """Check, evaluate, print."""
    warnings.filterwarnings("ignore", module="lightning")
    check(config)
    numbers = evaluate(config)
    if rank() == 0:
        Console().print(table(numbers, title=f"{config.run}, {config.weights} weights"))
    return numbers


if __name__ == "__main__":
    main()
