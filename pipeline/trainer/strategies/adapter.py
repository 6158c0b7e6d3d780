"""The adapter of the strategy a trainer runs, and the combinations that would be silently wrong."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from pipeline.trainer.strategies.ddp import Replicated
from pipeline.trainer.strategies.fsdp import FullySharded, FullyShardedStrategy
from pipeline.trainer.strategies.single import SingleProcess
from pipeline.trainer.strategies.zero import Zero, ZeroStrategy


def adapter(trainer: pl.Trainer, backward: Callable[[Tensor], None]) -> SingleProcess:
    """How a step runs under the trainer's strategy, once it has wrapped the model."""
    strategy = trainer.strategy
    match strategy:
        case FullyShardedStrategy():
            return FullySharded(
                model=strategy.model, backward=backward, reduce_gradients=strategy.reduce_gradients
            )
        case ZeroStrategy():
            return Zero(
                model=strategy.model, backward=backward, reduce_gradients=strategy.reduce_gradients
            )
        case DDPStrategy():
            return Replicated(model=strategy.model, backward=backward)
        case _:
            return SingleProcess(model=strategy.model, backward=backward)


def refuse_wrong_trainer(trainer: pl.Trainer, precision: str | int | None = None) -> None:
    """Raises ValueError for options of Lightning's Trainer that do something else here.

    precision: what the config asks for, as Lightning may take another.
    """
    strategy = trainer.strategy
    known = isinstance(
        strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy | ZeroStrategy
    )
    stock_deepspeed = isinstance(strategy, DeepSpeedStrategy) and not isinstance(
        strategy, ZeroStrategy
    )
    if not known or stock_deepspeed:
        raise ValueError(
            f"trainer.strategy is {type(strategy).__name__}, under which a step of several "
            "backwards is wrong or was never tried: use trainer=ddp, trainer=fsdp (FSDP2), or "
            "trainer=deepspeed_1, deepspeed_2, deepspeed_3"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} would contrast "
            "each part of a batch with itself alone: leave it at 1 and set micro_batch_size"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} is not applied in a step of "
            "ours: set gradient_clip_norm"
        )
    if str(precision) in ("16", "16-mixed") and trainer.precision == "bf16-mixed":
        raise ValueError(
            f"trainer.precision={precision} on a CPU, where Lightning would run bf16-mixed: set "
            "trainer.precision=bf16-mixed or 32-true"
        )
    gathers = isinstance(strategy, FullyShardedStrategy) and strategy.gather_bfloat16
    if gathers and trainer.precision != "bf16-mixed":
        raise ValueError(
            f"trainer.strategy.gather_bfloat16 with trainer.precision={trainer.precision}: set "
            "trainer.precision=bf16-mixed, or leave gather_bfloat16 out"
        )
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise ValueError(
            f"trainer.strategy: processes by {strategy._start_method} cannot take over a model and "
            "an open run: use trainer=ddp"
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        raise ValueError(
            "trainer.strategy: static_graph counts the backwards of the first step and a step of "
            "ours has several: leave it out"
        )


def refuse_wrong_model(
    trainer: pl.Trainer, model: nn.Module, *, micro_batch_size: int | None, compiled: bool
) -> None:
    """Raises ValueError for models that a step in micro-batches, or a strategy, gets wrong."""
    normalised = [
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.modules.batchnorm._NormBase)
    ]
    if normalised and micro_batch_size is not None:
        raise ValueError(
            f"{normalised[0]} normalises over the batch and would see one micro-batch at a time: "
            f"set micro_batch_size=null (it is {micro_batch_size}), or take layer norms"
        )
    if compiled and isinstance(trainer.strategy, ZeroStrategy) and trainer.strategy.stage == 3:
        raise ValueError(
            "compile_towers with ZeRO stage 3, which gathers weights between the layers: use "
            "trainer=fsdp, or compile_towers=false"
        )
