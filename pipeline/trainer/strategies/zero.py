"""DeepSpeed's ZeRO: optimizer state (1), gradients too (2), parameters too (3) in pieces.

Checkpoints are those of one process: whole tensors, written by rank 0 (`zero_state`).
"""

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.trainer.strategies.scalars import widen_scalars
from pipeline.trainer.strategies.single import Reduce, SingleProcess, check_reduce
from pipeline.trainer.strategies.zero_parts import Pieces
from pipeline.trainer.strategies.zero_state import (
    gathered,
    kept_frozen,
    load_optimizer,
    load_weights,
    loss_scale,
    set_loss_scale,
    set_value,
    value_of,
    whole_optimizer,
    whole_weights,
)


def prepare_cpu() -> None:
    """Let deepspeed run without an accelerator, on gloo."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # A shared-memory reduction that is compiled at the first start: minutes, and a build that was
    # killed leaves a lock on which every later start waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Zero(SingleProcess):
    """model: deepspeed's engine; it clips, decides whether to step, and keeps the loss scale.

    reduce_gradients: "once" a step, which holds a process's whole gradient until then; or at "each"
    micro-batch, which in stages 2 and 3 holds only pieces and sends as often. Stages 0 and 1 send
    once either way.
    """

    model: Any  # deepspeed.DeepSpeedEngine

    def __init__(
        self, *, model: Any, backward: Callable[[Tensor], None], reduce_gradients: Reduce
    ) -> None:
        super().__init__(model=model, backward=backward)
        self.stage = model.zero_optimization_stage()
        self.coalesced = reduce_gradients == "once" and self.stage >= 2

    def session(self) -> AbstractContextManager:
        return self.model.coalesce_grad_reduction() if self.coalesced else nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if not self.coalesced:
            # Without it every backward is the step's last, and stages 1 and 2 keep only that one's.
            self.model.set_gradient_accumulation_boundary(last)
        self._backward(loss)

    def clip(self, limit: float | None) -> None:
        """The engine does it in its step, from stage 1 on."""
        if self.stage == 0:
            super().clip(limit)

    def outcome(self) -> tuple[float, bool]:
        if self.stage == 0:
            return super().outcome()
        norm = self.model.get_global_grad_norm()
        return float("nan") if norm is None else float(norm), self.model.was_step_applied()

    def clamp(self, parameter: nn.Parameter, least: float, most: float) -> None:
        value = value_of(parameter)
        if not least <= value.item() <= most:
            set_value(parameter, value.clamp(least, most))


def zero_options(stage: int, *, offload: bool, on_cpu: bool) -> dict[str, Any]:
    """What deepspeed's config needs to be told, as its defaults are wrong here."""
    offloaded = {"device": "cpu", "pin_memory": not on_cpu}
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": not on_cpu,
        "contiguous_gradients": True,
        **({"offload_optimizer": offloaded} if offload else {}),
        **({"offload_param": offloaded} if offload and stage == 3 else {}),
    }
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own Adam for the CPU is compiled at the first start; torch's is there.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # 1.0 unless said otherwise
    }


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy for DeepSpeed, with checkpoints that any strategy reads, also on CPUs.

    stage: 0 to 3.  offload: keep optimizer state, and in stage 3 parameters, in the host's memory.
    reduce_gradients: see `Zero`.  options: further keys of deepspeed's `zero_optimization`.
    Raises ValueError for what DeepSpeed would do wrongly without a word.
    """

    def __init__(
        self,
        *,
        stage: int,
        offload: bool = False,
        reduce_gradients: Reduce = "once",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_reduce(reduce_gradients)
        if stage not in range(4) or (offload and stage == 0):
            raise ValueError(
                f"trainer.strategy.stage={stage} offload={offload}: a stage is 0, 1, 2 or 3, and "
                "stage 0 has nothing to offload"
            )
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            prepare_cpu()
        config = zero_options(stage, offload=offload, on_cpu=on_cpu)
        config["zero_optimization"] |= dict(options or {})
        super().__init__(config=config, logging_batch_size_per_gpu=1)
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # for its own log alone
        self.stage, self.reduce_gradients, self.on_cpu = stage, reduce_gradients, on_cpu
        self._names: list[list[str]] = []
        self._shapes: dict[str, torch.Size] = {}
        self._frozen: dict[str, Tensor] = {}

    def prepare(self, module: pl.LightningModule) -> None:
        """Called by the module's configure_model. Does nothing a second time."""
        self._shapes = self._shapes or widen_scalars(module)

    def setup_environment(self) -> None:
        if self.on_cpu:
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.on_cpu:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    def setup(self, trainer: pl.Trainer) -> None:
        self._init_config_if_needed()
        if self.stage == 0 and self.precision_plugin.precision != "32-true":
            raise ValueError(
                f"trainer.precision={self.precision_plugin.precision} with stage=0: use "
                "trainer=ddp, or a stage from 1 on"
            )
        # Stage 0 has no optimizer of its own: `Zero.clip` does it.
        limit = self.lightning_module.gradient_clip_norm if self.stage else None
        self.config["gradient_clipping"] = limit or 0.0
        if self.config.get("bf16", {}).get("enabled"):
            self.config["bf16"]["check_grad_overflow"] = True
            if self.stage == 1:
                # Its optimizer for bfloat16 in stage 1 is another one, whose state cannot be read
                # whole; stage 2's, sending once, does the same and keeps less.
                self.config["zero_optimization"]["stage"] = 2
                self.reduce_gradients = "once"
        if self.config.get("bf16", self.config.get("fp16", {})).get("enabled"):
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        super().setup(trainer)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        names = {parameter: name for name, parameter in model.named_parameters()}
        if self.stage > 0:
            refuse_whole_parameter_rules(optimizer)
        self._names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        if self.precision_plugin.precision != "32-true":
            self._frozen = kept_frozen(model)
        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        if self.stage == 3:
            register_loss_parameters(model)
        use_pieces(engine)
        return engine, optimizer

    def whole(self) -> AbstractContextManager:
        """Inside, every parameter has its shape and values on every rank."""
        return gathered(list(self.lightning_module.parameters()))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Not through the engine's forward: a step has many, one a micro-batch."""
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    @property
    def _scales_loss(self) -> bool:
        return self.precision_plugin.precision == "16-mixed"

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        whole = whole_weights(self.lightning_module, self._shapes, self._frozen)
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        whole = whole_optimizer(self.model, self._names, self._shapes)
        return whole if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self._scales_loss:
            checkpoint["zero_loss_scale"] = loss_scale(self.model)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = self.broadcast(checkpoint_path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        weights = checkpoint["state_dict"]
        load_weights(self.lightning_module, weights, self._frozen, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for content in checkpoint["optimizer_states"]:  # one; none after optimizer_state=reset
            load_optimizer(self.model, self._names, content)
        if self._scales_loss:
            set_loss_scale(self.model, checkpoint.get("zero_loss_scale", {}))


def register_loss_parameters(module: nn.Module) -> None:
    """Stage 3 gathers a module's parameters for its own forward alone; the loss's are read in the
    root's.
    """
    import deepspeed

    owned = {
        *module.model.loss_parameters().values(),
        *module.objective.parameters(),
    }
    for parameter in owned:
        deepspeed.zero.register_external_parameter(module, parameter)


def refuse_whole_parameter_rules(optimizer: Optimizer) -> None:
    """ZeRO gives an optimizer flat pieces: a rule that reads a parameter's shape or norm is wrong.

    An optimizer that is right on pieces and not in torch says so: `elementwise = True`, or by the
    `parts` (`pipeline.optim.parts`) that it asks.
    """
    known = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam)
    right = isinstance(optimizer, known) or getattr(optimizer, "elementwise", False)
    if not right and not hasattr(optimizer, "parts"):
        raise ValueError(
            f"{type(optimizer).__name__} looks at whole parameters and ZeRO gives it flat pieces "
            "of them: use trainer=ddp or trainer=fsdp, or optimizer=adamw or lamb"
        )


def use_pieces(engine: Any) -> None:
    """Tell the engine's optimizer where the parameters are, if it wants to know."""
    if engine.zero_optimization_stage() > 0 and hasattr(engine.optimizer.optimizer, "parts"):
        engine.optimizer.optimizer.parts = Pieces(engine)
