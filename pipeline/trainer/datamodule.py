"""The training stream as Lightning wants it: built on each rank, its position kept in the
checkpoint.
"""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from pipeline.data.images import ImageTransform
from pipeline.data.stream import CaptionSampler, ShardStream
from pipeline.phases import Phase


class ShardData(pl.LightningDataModule):
    """shards: directory of a dataset. workers: loader processes per rank. window_shards, captions
    and late_balance: see ShardStream.

    transform, tokenizer, phase and seed come from the run, not from the data node.
    """

    def __init__(
        self,
        *,
        shards: str,
        workers: int = 2,
        window_shards: int = 16,
        captions: CaptionSampler | None = None,
        late_balance: bool = False,
    ):
        super().__init__()
        self.shards, self.workers, self.window_shards = shards, workers, window_shards
        self.captions, self.late_balance = captions, late_balance
        self.run: dict[str, Any] = {}
        self.stream: ShardStream | None = None

    def for_run(
        self,
        *,
        transform: ImageTransform,
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
        phase: Phase,
        seed: int,
    ) -> "ShardData":
        """Give the data what the rest of the run decides."""
        self.phase = phase
        self.run = {
            "transform": transform,
            "tokenizer": tokenizer,
            "global_batch_size": phase.config.global_batch_size,
            "seed": seed,
        }
        return self

    def open(self, *, rank: int, world_size: int) -> ShardStream:
        """The stream of one rank."""
        self.stream = ShardStream(
            shards=self.shards,
            workers=self.workers,
            window_shards=self.window_shards,
            captions=self.captions,
            late_balance=self.late_balance,
            rank=rank,
            world_size=world_size,
            **self.run,
        )
        return self.stream

    def train_dataloader(self) -> ShardStream:
        stream = self.open(rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        # The loader reads ahead of the optimizer, so the position is counted in finished steps.
        stream.position = self.phase.samples_at(self.trainer.global_step)
        return stream

    def state_dict(self) -> dict[str, int]:
        done = self.phase.samples_at(self.trainer.global_step)
        return {**self.stream.state_at(done), "pairs": len(self.stream)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # The stream is opened later; global_step gives the position. Here only what must agree.
        if state["seed"] != self.run["seed"]:
            raise ValueError(
                f"the checkpoint's data order has seed {state['seed']}, this run has "
                f"{self.run['seed']}: set seed={state['seed']} or give the run another name"
            )
