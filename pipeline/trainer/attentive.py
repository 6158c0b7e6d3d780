"""Attentive masking as a training loop (A-CLIP, arXiv:2212.08653): an averaged tower looks at a
wide crop, and the views keep the patches that its class token looked at.

Letters: B local pairs, V training views, N patches, K kept patches, P projection width.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from pipeline.data.images import ImageTransform
from pipeline.data.three_views import ThreeViews
from pipeline.models.views import Teacher, ViewsCLIP
from pipeline.tokens.attentive import AttentiveTokens, mapped
from pipeline.trainer.callbacks.ema import Ema
from pipeline.trainer.module import ContrastiveModule
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy
from pipeline.trainer.strategies.zero import ZeroStrategy


def module_class(
    model: nn.Module, transform: ImageTransform, image_tokens: Any
) -> type[ContrastiveModule]:
    """Which training loop a run has. Raises ValueError for a part of attentive masking without the
    others.
    """
    parts = {
        "image_tokens=attentive": isinstance(image_tokens, AttentiveTokens),
        "transform=three_views": isinstance(transform, ThreeViews),
        "model._target_=pipeline.models.views.ViewsCLIP": isinstance(model, ViewsCLIP),
    }
    if any(parts.values()) and not all(parts.values()):
        missing = [part for part, given in parts.items() if not given]
        given = [part for part, given in parts.items() if given]
        raise ValueError(
            f"{', '.join(given)} without {', '.join(missing)}: views, their model and attentive "
            "masking belong together; set all three, as recipe=aclip_b16_yfcc15m does, or none"
        )
    return AttentiveModule if any(parts.values()) else ContrastiveModule


def attentive_inputs(
    teacher: Teacher,
    weights: Mapping[str, Tensor],
    policy: AttentiveTokens,
    images: Tensor,
    boxes: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor | None, Tensor]:
    """Kept patches (B, V, K) of the views, or None at keep=1, and the target (B, P).

    images: (B, 3, S, S), the wide crops, normalised.  boxes: (B, V + 1, 4), theirs last.  chunk:
    images of one forward. weights: of the teacher, under its names; what is not among them is the
    trained model's. A function of its arguments: nothing is drawn.
    """
    rows = [
        torch.func.functional_call(teacher, dict(weights), (part,)) for part in images.split(chunk)
    ]
    attention, target = (torch.cat(parts) for parts in zip(*rows, strict=True))
    kept = [
        policy.from_attention(mapped(attention, boxes[:, view], boxes[:, -1]))
        for view in range(boxes.shape[1] - 1)
    ]
    return None if kept[0] is None else torch.stack(kept, dim=1), target


class AttentiveModule(ContrastiveModule):
    """ContrastiveModule whose step is given two views, the patches to keep of each, and BYOL's
    target.

    The teacher's weights are the averages of the run's `ema`, updated after the optimizer's step
    and kept in the checkpoint; what both passes of the step are given is computed once, before.
    Price: a forward of the image tower over all patches of the wide crop, without a graph.
    Raises ValueError without `ema`, and under strategies that keep pieces of it.
    """

    def on_train_start(self) -> None:
        self.average = averages(self.trainer)
        # outside of what is trained: the same modules under other names would be saved twice
        self.teacher = (Teacher(self.model),)
        super().on_train_start()

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        images = batch["images"]
        (teacher,) = self.teacher
        weights = teacher.named(self.average.weights)
        kept, target = attentive_inputs(
            teacher,
            {name: weight.to(self.dtype_of_weights) for name, weight in weights.items()},
            self.image_tokens,
            self.transform.normalise(images[:, -1]).to(self.dtype_of_weights),
            batch["boxes"],
            chunk=self.micro_batch_size or len(images),
        )
        return images[:, :-1], self.reduced_text(batch["tokens"]), kept, None, target


def averages(trainer: pl.Trainer) -> Any:
    """The run's moving average. Raises ValueError: see AttentiveModule."""
    strategy = trainer.strategy
    cut = isinstance(strategy, FullyShardedStrategy) or (
        isinstance(strategy, ZeroStrategy) and strategy.stage == 3
    )
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ZeroStrategy)
    callback = next((c for c in trainer.callbacks if isinstance(c, Ema)), None)
    refuse_without_average(averaged=callback is not None, whole=known and not cut)
    return callback.average


def refuse_without_average(*, averaged: bool, whole: bool) -> None:
    """averaged: the run has an `ema`.  whole: its strategy keeps whole parameters."""
    if not whole:
        raise ValueError(
            "image_tokens=attentive runs its averaged tower whole, and this strategy keeps pieces "
            "of it: use trainer=ddp, or deepspeed_1 or deepspeed_2"
        )
    if not averaged:
        raise ValueError(
            "image_tokens=attentive takes its attention from the run's moving average and there is "
            "none: set ema=cosine"
        )
