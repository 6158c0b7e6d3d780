"""Lightning glue around the cached contrastive step: order of calls, learning rate, logging. No
maths.
"""

import hashlib
import logging
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.images import ImageTransform
from pipeline.losses.objective import Objective
from pipeline.models.resize import resize_positions
from pipeline.phases import Phase
from pipeline.trainer.cached_step import (
    CachedContrastiveStep,
    Encoded,
    encoded,
    formula,
    scalars,
)
from pipeline.trainer.checkpoints import newest_of
from pipeline.trainer.phases import carried_state
from pipeline.trainer.skipped_steps import SkippedSteps
from pipeline.trainer.strategies.adapter import adapter, refuse_wrong_model
from pipeline.trainer.strategies.blocks import blocks
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy
from pipeline.trainer.strategies.zero import ZeroStrategy

log = logging.getLogger(__name__)


class TokenPolicy(Protocol):
    """Which tokens a tower sees: a function of noise alone, so that both passes see the same."""

    def from_noise(self, noise: Tensor) -> Tensor | None: ...


class TextPolicy(Protocol):
    """A shorter caption: (B, L) token ids and as much noise -> (B, C) ids, start and end kept."""

    def reduce(self, tokens: Tensor, noise: Tensor) -> Tensor: ...


class Optimizer(Protocol):
    """Hyper-parameters that become a torch optimizer; its groups have a `base_lr`."""

    def make(self, model: nn.Module) -> torch.optim.Optimizer: ...


class Schedule(Protocol):
    """The learning rate's factor, by pairs seen."""

    def factor(self, samples_done: int, samples_total: int, batch: int) -> float: ...


def _derived_seed(*what: Any) -> int:
    digest = hashlib.blake2b(" ".join(map(str, what)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


NOISE_BLOCK = 1024


def step_noise(
    seed: int, step: int, first: int, pairs: int, tokens: int, *, what: str = "tokens"
) -> Tensor:
    """(pairs, tokens) uniforms, for the pairs from `first` on of a step's global batch: the same
    for a pair on whichever rank it is. what: draws under another word are independent.

    Drawn in blocks of pairs with seeds of their own, since all of a batch of 65,536 would take
    longer than some steps: a rank draws the blocks it has pairs in.
    """
    parts = []
    for start in range(first - first % NOISE_BLOCK, first + pairs, NOISE_BLOCK):
        block = [start // NOISE_BLOCK] if start else []
        source = torch.Generator().manual_seed(_derived_seed(seed, what, step, *block))
        rows = min(NOISE_BLOCK, first + pairs - start)
        parts.append(torch.rand(rows, tokens, generator=source)[max(first - start, 0) :])
    return torch.cat(parts)


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's allocations at their highest, of a CPU's process everything it held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class ContrastiveModule(pl.LightningModule):
    """One optimizer step per batch, by hand: Lightning's automatic mode knows one backward a step.

    gradient_clip_norm: None for no clipping; the norm is logged either way.
    phase: which part of the run this is; its config gives the batch. A checkpoint of the phase
    before hands over the optimizer's state by parameter names, or, with optimizer_state="reset",
    none.
    max_skipped_steps: in a row, for want of a finite gradient; one more ends the run.
    first_weights: gives what a model that was built without weights starts from; None: a checkpoint
    does.
    compile_towers: torch.compile for each transformer block; costs a minute at the start.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        transform: ImageTransform,
        image_tokens: TokenPolicy | None,
        text_tokens: TextPolicy | None,
        optimizer: Optimizer,
        schedule: Schedule,
        phase: Phase,
        micro_batch_size: int | None,
        gradient_clip_norm: float | None,
        log_every_steps: int,
        seed: int,
        optimizer_state: str = "keep",
        max_skipped_steps: int = 10,
        compile_towers: bool = False,
        first_weights: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.objective = model, objective
        self.transform = transform
        self.image_tokens, self.text_tokens = image_tokens, text_tokens
        self.optimizer = optimizer
        self.schedule, self.phase, self.optimizer_state = schedule, phase, optimizer_state
        self.global_batch_size = phase.config.global_batch_size
        self.micro_batch_size = micro_batch_size
        self.gradient_clip_norm, self.log_every_steps = gradient_clip_norm, log_every_steps
        self.seed = seed
        self.scalars, self.formula = scalars(model, objective), formula(objective)
        self.skipped = SkippedSteps(limit=max_skipped_steps)
        self.compile_towers, self.first_weights = compile_towers, first_weights
        self.last_logged: dict[str, float] = {}
        self.bad_before = self.bad_records = 0  # of all ranks in earlier lives; of this rank
        self.waited = self.worked = 0.0
        self.mark = 0.0
        # of a pair's forward and backward, and of a device: see callbacks/utilisation.py
        self.flops_per_pair, self.peak_flops = 0.0, None

    def configure_model(self) -> None:
        """Compile and cut, where that is asked for, before the optimizer sees parameters."""
        refuse_wrong_model(
            self.trainer,
            self.model,
            micro_batch_size=self.micro_batch_size,
            compiled=self.compile_towers,
        )
        if self.compile_towers:
            # A phase before used up some of Dynamo's graphs; behind its limit of 8 for a block's
            # code a block runs uncompiled. Two towers need 8: by gradient, by size of micro-batch.
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
            for block in blocks(self.model):
                block.compile()
        if isinstance(self.trainer.strategy, FullyShardedStrategy | ZeroStrategy):
            self.trainer.strategy.prepare(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer.make(self)

    def forward(self, images: Tensor, *rest: Tensor | None) -> Encoded:
        """A micro-batch's embeddings and the loss's parameters: see `encoded`.

        images: (B, ..., 3, H, W) uint8.
        """
        # Here and not before: all of a large batch takes four times the memory as float32. Where a
        # strategy keeps weights in half precision it leaves pictures as they are.
        chunk = (self.transform.normalise(images).to(self.dtype_of_weights), *rest)
        return encoded(self.model, self.objective, chunk, self.scalars)

    def of_all_ranks(self, *numbers: float) -> Tensor:
        """(ranks, numbers) in float64. A collective."""
        ours = torch.tensor(numbers, dtype=torch.float64)
        if self.trainer.world_size == 1:
            return ours[None]
        ours = ours.to(self.device)
        parts = [torch.empty_like(ours) for _ in range(self.trainer.world_size)]
        dist.all_gather(parts, ours)
        return torch.stack(parts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        bad = self.of_all_ranks(self.bad_records).sum()
        checkpoint["bad_records"] = self.bad_before + int(bad)
        checkpoint["phase"] = self.phase.name
        checkpoint["skipped_steps"] = self.skipped.total

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of the phase before is made to fit this one."""
        self.skipped.total = checkpoint.get("skipped_steps", 0)
        self.bad_before = checkpoint.get("bad_records", 0)
        if checkpoint.get("phase", "") == self.phase.name:
            return
        strategy = self.trainer.strategy
        with strategy.whole() if isinstance(strategy, ZeroStrategy) else nullcontext():
            self._take_over(checkpoint)

    def _take_over(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        ours = {name.removeprefix("model."): w for name, w in weights.items()}
        resized, changes = resize_positions(ours, self.model)
        weights |= {name: resized[name.removeprefix("model.")] for name in weights}
        for name, (before, after) in changes.items():
            log.info("phase %s: %s resized, %d -> %d rows", self.phase.name, name, before, after)
        saved, checkpoint["optimizer_states"] = checkpoint["optimizer_states"], []
        if self.optimizer_state == "keep":
            fresh = self.configure_optimizers()
            checkpoint["optimizer_states"] = [carried_state(state, fresh) for state in saved]

    def on_train_start(self) -> None:
        """Set up the step, once the strategy has wrapped the model."""
        self.dtype_of_weights = next(self.model.parameters()).dtype
        self.strategy = adapter(self.trainer, self.manual_backward)
        self.step = CachedContrastiveStep(
            encode=self.strategy.encode,
            loss_scalars=self.model.loss_scalars,
            objective=self.formula,
            micro_batch_size=self.micro_batch_size,
            backward=self.strategy.backward,
            session=self.strategy.session,
            metric=self.model.metric,
        )
        self.mark = time.perf_counter()

    @property
    def tokens_per_image(self) -> int:
        """Patches that the image tower sees in training."""
        patches = self.model.image.num_tokens
        return patches if self.image_tokens is None else self.image_tokens.num_kept(patches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Where gradients are unscaled, in every precision.
        self.strategy.clip(self.gradient_clip_norm)

    def noise(self, local_batch: int, tokens: int, *, what: str) -> Tensor:
        """This rank's rows of the step's noise."""
        first = self.trainer.global_rank * local_batch
        step = self.trainer.global_step
        return step_noise(self.seed, step, first, local_batch, tokens, what=what)

    def kept_tokens(self, local_batch: int) -> Tensor | None:
        """Patch indices (B, K) of this rank's pairs in this step, or None when nothing is
        dropped.
        """
        if self.image_tokens is None:
            return None
        noise = self.noise(local_batch, self.model.image.num_tokens, what="tokens")
        kept = self.image_tokens.from_noise(noise)
        return None if kept is None else kept.to(self.device)

    def reduced_text(self, tokens: Tensor) -> Tensor:
        """This rank's captions as the text tower sees them in this step."""
        if self.text_tokens is None:
            return tokens
        noise = self.noise(*tokens.shape, what="words")
        return self.text_tokens.reduce(tokens, noise.to(tokens.device))

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """What both passes of the step are given: see CachedContrastiveStep."""
        images = batch["images"]
        return images, self.reduced_text(batch["tokens"]), self.kept_tokens(len(images))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One optimizer step on the local batch of ShardStream."""
        started = time.perf_counter()
        self.waited += started - self.mark
        self.bad_records += int(batch["bad"])
        optimizer = self.optimizers()
        done = self.phase.samples_at(self.trainer.global_step) - self.phase.first_sample
        assert done >= 0, "the phase before has not ended"
        total = self.phase.config.samples_seen
        factor = self.schedule.factor(done, total, self.global_batch_size)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.zero_grad()
        # What towers draw (dropout) continues alike after a restart.
        torch.manual_seed(
            _derived_seed(self.seed, "towers", self.trainer.global_step, self.global_rank)
        )
        logged = self.step(*self.inputs(batch))
        optimizer.step()
        grad_norm, applied = self.strategy.outcome()
        for bounds in self.model.bounds():
            self.strategy.clamp(*bounds)
        step = self.trainer.global_step
        self.skipped.record(
            applied,
            samples_seen=self.phase.samples_at(step),
            last_good=partial(newest_of, self.trainer),
        )
        self.worked += time.perf_counter() - started
        if step % self.log_every_steps == 0 or step in (1, self.trainer.max_steps):
            self.write(logged, grad_norm, optimizer.param_groups[0]["lr"], step)

    def on_train_batch_end(self, *_: Any) -> None:
        # After all callbacks: an evaluation or a checkpoint is neither work nor waiting for data.
        self.mark = time.perf_counter()

    def write(self, logged: Mapping[str, Tensor], grad_norm: float, lr: float, step: int) -> None:
        """One row for every logger, keys as on the dashboard, x-axis samples_seen."""
        names, values = list(logged), torch.stack([v.float() for v in logged.values()])
        if self.trainer.world_size > 1:
            dist.all_reduce(values)
            values /= self.trainer.world_size
        row = {f"train/{name}": value for name, value in zip(names, values.tolist(), strict=True)}
        row |= {
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/skipped_steps": self.skipped.total,
        }
        # The slowest rank's: the others wait for it in their work.
        ranks = self.of_all_ranks(self.waited, self.worked, self.bad_records)
        waited = (ranks[:, 0] / ranks[:, :2].sum(1).clamp(min=1e-9)).max().item()
        elapsed = self.waited + self.worked
        steps = self.log_every_steps if step % self.log_every_steps == 0 else 1
        row |= {
            "perf/pairs_per_second": steps * self.global_batch_size / max(elapsed, 1e-9),
            "perf/data_wait_fraction": waited,
            "perf/peak_memory_gib": peak_memory(self.device) / 2**30,
            "perf/tokens_per_image": self.tokens_per_image,
            "data/bad_records": self.bad_before + int(ranks[:, 2].sum()),
            "samples_seen": self.phase.samples_at(step),
        }
        if self.peak_flops is not None:
            rate = row["perf/pairs_per_second"] * self.flops_per_pair
            row["perf/mfu"] = rate / (self.peak_flops * self.trainer.world_size)
        self.waited = self.worked = 0.0
        self.last_logged = row
        for logger in self.loggers:
            logger.log_metrics(row, step=step)
