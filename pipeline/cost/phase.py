"""What a phase of a run costs before it starts: floating-point operations, GPU-hours, memory.

Arithmetic on counted shapes; the device and its throughput are given, not measured.
Letters: m local pairs, G global pairs, D embedding width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from pipeline.config import build
from pipeline.cost.optimizer import state_bytes
from pipeline.cost.towers import TowerCost, forward_flops, tower_cost
from pipeline.models.freeze import freeze
from pipeline.models.views import VIEWS, Teacher, ViewsCLIP
from pipeline.phases import Phase

# bf16 without sparsity, the vendor's figures
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}
HALF = {"bf16": torch.bfloat16, "16": torch.float16}
# What is cut into pieces over the processes: weights, gradients, optimizer state; and whether the
# optimizer steps on float32 copies of its pieces (DeepSpeed's does, in float32 too).
STRATEGIES = {
    "DDP": (False, False, False, False),
    "ZeRO-1": (False, False, True, True),
    "ZeRO-2": (False, True, True, True),
    "ZeRO-3": (True, True, True, True),
    "FSDP2": (True, True, True, False),
}


@dataclass(frozen=True)
class PhaseCost:
    """local, micro: pairs of a process in a step and in a forward. patches, kept: of an image, all
    and those that the tower sees; caption, words: positions of a text.

    views: of each image that are trained on, and the image tower's cost is that of all. wide_flops:
    of the averaged tower's forward on one more crop, 0 without one. state_bytes: of the optimizer.
    weight_bytes: of one weight, gradient and half-precision copies aside. mixed: whether products
    are in half precision. logits: whether the loss
    keeps its logits. averaged: whether a moving average is kept.
    """

    phase: Phase
    world_size: int
    local: int
    micro: int
    embed_dim: int
    image_size: int
    patches: int
    kept: int
    caption: int
    words: int
    image: TowerCost
    text: TowerCost
    image_recomputed: bool
    text_recomputed: bool
    state_bytes: int
    weight_bytes: int
    mixed: bool
    logits: bool
    averaged: bool
    views: int = 1
    wide_flops: int = 0

    @property
    def run_twice(self) -> float:
        """Share of the pairs whose forward runs once more: all but a step's last micro-batch."""
        last = self.local % self.micro or self.micro
        return 1 - last / self.local

    def _tower_flops(self, tower: TowerCost, recomputed: bool) -> float:
        learns = tower.trained > 0
        return tower.flops * (1 + 2 * learns + (learns and recomputed) + self.run_twice)

    @property
    def flops_per_pair(self) -> float:
        """Forward and backward, which is twice the forward; the second forward of the cached step
        and that of activation checkpointing. A tower that does not learn has no backward.
        """
        return (
            self._tower_flops(self.image, self.image_recomputed)
            + self._tower_flops(self.text, self.text_recomputed)
            + self.loss_flops_per_pair
            + self.wide_flops
        )

    @property
    def model_flops_per_pair(self) -> float:
        """Forward and backward alone, what MFU counts: nothing that is computed twice."""
        towers = sum(t.flops * (1 + 2 * (t.trained > 0)) for t in (self.image, self.text))
        return towers + self.loss_flops_per_pair + self.wide_flops

    @property
    def loss_flops_per_pair(self) -> int:
        """Six products of local by global by D: softmax in both directions; others need fewer."""
        return 12 * self.phase.config.global_batch_size * self.embed_dim

    @property
    def flops(self) -> float:
        return self.flops_per_pair * self.phase.samples

    def gpu_hours(self, peak: float, mfu: float) -> float:
        return self.flops / (peak * mfu) / 3600

    @property
    def parameters(self) -> int:
        return self.image.parameters + self.text.parameters

    def memory(self, strategy: str) -> dict[str, int]:
        """Bytes on one GPU by what they are for."""
        cut_weights, cut_gradients, cut_state, masters = STRATEGIES[strategy]

        def share(count: int, cut: bool) -> int:
            return -(-count // self.world_size) if cut else count

        half = masters and self.mixed  # DeepSpeed's weights themselves are in half precision then
        width = 2 if half else self.weight_bytes
        weights, average = width * self.parameters, 4 * self.parameters * self.averaged
        trained = self.image.trained + self.text.trained
        gradients = self.weight_bytes * trained
        if strategy == "DDP" and self.world_size > 1:
            gradients *= 2  # and the buckets they are averaged in
        # A block that is used is there whole, with its gradient, and the next one is on its way.
        block = max(self.image.largest_block, self.text.largest_block)
        whole_blocks = 2 * 2 * width * block if cut_weights else 0
        return {
            "weights": share(weights, cut_weights) + share(average, cut_weights) + whole_blocks,
            "half copies": 0 if half else self.image.fixed_bytes + self.text.fixed_bytes,
            "gradients": share(gradients, cut_gradients),
            "masters": share(4 * trained, True) if masters else 0,
            "optimizer": share(self.state_bytes, cut_state),
            "activations": self.pair_bytes * self.micro,
            # as they came, in uint8, and a micro-batch's normalised, in float32
            "images": self.image_values * (self.local + 4 * self.micro),
            "features, loss": self.loss_bytes,
        }

    @property
    def pair_bytes(self) -> int:
        """Activations of one pair of a micro-batch."""
        return self.image.sample_bytes + self.text.sample_bytes

    @property
    def image_values(self) -> int:
        """Of one pair's crops."""
        return (self.views + bool(self.wide_flops)) * 3 * self.image_size**2

    @property
    def loss_bytes(self) -> int:
        """Features of all pairs, gathered; of the local ones with gradients; logits of both
        directions with their softmax, where the loss keeps them. In float32.
        """
        batch = self.phase.config.global_batch_size
        features = 2 * 4 * self.embed_dim * (batch + 2 * self.local)
        return features + (4 * 4 * self.local * batch if self.logits else 0)

    def largest_micro_batch(self, strategy: str, memory: float) -> int:
        """Pairs of a forward that fit into `memory` bytes, at most the local batch; 0 for none."""
        used = self.memory(strategy)
        rest = memory - sum(used.values()) + used["activations"]
        return max(0, min(self.local, int(rest // max(self.pair_bytes, 1))))


def shapes_of(cfg: DictConfig) -> nn.Module:
    """The model of a phase's config on the meta device, with what is frozen; no activation
    checkpointing, which is accounted for.
    """
    node = cfg.model.copy()
    for tower in ("image", "text"):
        if node[tower].get("activation_checkpointing"):
            node[tower].activation_checkpointing = False
    with torch.device("meta"):
        model = build(node)
    freeze(model, cfg.frozen)
    return model


def words_of(cfg: DictConfig) -> tuple[int, int]:
    """Text positions: of a caption, and those that the tower sees in training."""
    length = OmegaConf.select(cfg, "tokenizer.context_length") or cfg.model.text.context_length
    kept = OmegaConf.select(cfg, "text_tokens.context_length")
    return length, length if kept is None else min(kept, length)


def phase_cost(phase: Phase, world_size: int) -> PhaseCost:
    """Count a phase of a checked config. Raises ValueError for a model without blocks."""
    cfg = phase.config
    model = shapes_of(cfg)
    size, patches = model.image.image_size, model.image.num_tokens
    caption, words = words_of(cfg)
    policy = build(cfg.image_tokens) if cfg.image_tokens else None
    kept = patches if policy is None else policy.num_kept(patches)
    precision = str(OmegaConf.select(cfg, "trainer.precision", default="32-true"))
    half = HALF.get(precision.partition("-")[0])
    mixed = half if precision.endswith("-mixed") else None
    if half is not None and mixed is None:
        model = model.to(half)
    recomputed = {
        tower: bool(cfg.model[tower].get("activation_checkpointing")) for tower in ("image", "text")
    }

    def encode_text(batch: int) -> torch.Tensor:
        return model.encode_text(torch.zeros(batch, words, dtype=torch.int64, device="meta"))

    image = ImageSide(model, kept)
    local = cfg.global_batch_size // world_size
    return PhaseCost(
        phase=phase,
        world_size=world_size,
        local=local,
        micro=cfg.micro_batch_size or local,
        embed_dim=model.embed_dim,
        image_size=size,
        patches=patches,
        kept=kept,
        caption=caption,
        words=words,
        image=tower_cost(
            model.image,
            image.parts,
            image.encode,
            half=mixed,
            recompute=recomputed["image"],
        ),
        text=tower_cost(
            model.text, model.text_projection, encode_text, half=mixed, recompute=recomputed["text"]
        ),
        image_recomputed=recomputed["image"],
        text_recomputed=recomputed["text"],
        state_bytes=state_bytes(build(cfg.optimizer), model),
        weight_bytes=next(model.parameters()).element_size(),
        mixed=mixed is not None,
        logits=_keeps_logits(cfg.loss),
        averaged=bool(cfg.ema),
        views=image.views,
        wide_flops=image.wide_flops(),
    )


class ImageSide:
    """What a step computes of one pair's images, on the meta device: one view, or a ViewsCLIP's
    two and the averaged tower's look at a third crop. kept: patches of a view.
    """

    def __init__(self, model: nn.Module, kept: int) -> None:
        self.model, self.kept = model, kept
        self.several = isinstance(model, ViewsCLIP)
        self.views = VIEWS if self.several else 1
        self.parts = model.image_parts() if self.several else model.image_projection

    def encode(self, batch: int) -> None:
        shape = (batch, self.views) if self.several else (batch,)
        kept = None
        if self.kept < self.model.image.num_tokens:
            kept = torch.zeros(*shape, self.kept, dtype=torch.int64, device="meta")
        encode = self.model.encode_views if self.several else self.model.encode_image
        encode(self._images(*shape), kept)

    def wide_flops(self) -> int:
        if not self.several:
            return 0
        teacher = Teacher(self.model)
        return forward_flops(lambda: teacher(self._images(1)))

    def _images(self, *shape: int) -> torch.Tensor:
        size, dtype = self.model.image.image_size, next(self.model.parameters()).dtype
        return torch.empty(*shape, 3, size, size, device="meta", dtype=dtype)


def _keeps_logits(loss: Mapping[str, DictConfig]) -> bool:
    """A term with a `tile` holds one tile of the logits at a time."""
    return any("tile" not in term for term in loss.values() if term is not None)
