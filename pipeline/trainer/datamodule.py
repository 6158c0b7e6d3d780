"""The training stream as Lightning wants it: built on each rank, its position kept in the
checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from pipeline.data.images import ImageTransform
from pipeline.data.stream import Batch, CaptionSampler, ShardStream
from pipeline.phases import Phase


class UnendingBatches:
    """A stream as Lightning counts it: in batches, of which a run never sees the last.

    A stream's own length is in pairs. Where Lightning meets an end it begins anew, which throws the
    loader's workers away and what they have read ahead. With no length at all it would hold a batch
    back, and the stream's state would be one batch ahead of the step.
    """

    def __init__(self, stream: ShardStream, *, steps: int):
        self.stream, self.steps = stream, steps

    def __len__(self) -> int:
        return self.steps + 1

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.stream)

    def state_dict(self) -> dict[str, int]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing: the stream stands where the count of pairs says, which another phase's state,
        of other data, does not.
        """


class ShardData(pl.LightningDataModule):
    """workers: loader processes per rank. Everything else: see ShardStream.

    transform, tokenizer, phase and seed come from the run, not from the data node.
    """

    def __init__(
        self,
        *,
        shards: str | None = None,
        mixture: Sequence[Mapping[str, Any]] | None = None,
        workers: int = 2,
        window_shards: int = 16,
        captions: CaptionSampler | None = None,
        late_balance: bool = False,
        verify: Literal["size", "sha256", "none"] = "size",
        cache: str | None = None,
        cache_gib: float = 100.0,
        max_bad_fraction: float = 0.1,
    ):
        super().__init__()
        self.knobs = {
            "shards": shards,
            "mixture": mixture,
            "workers": workers,
            "window_shards": window_shards,
            "captions": captions,
            "late_balance": late_balance,
            "verify": verify,
            "cache": cache,
            "cache_gib": cache_gib,
            "max_bad_fraction": max_bad_fraction,
        }
        self.run: dict[str, Any] = {}
        self.stream: ShardStream | None = None
        self.state: dict[str, Any] | None = None

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
        self.stream = ShardStream(rank=rank, world_size=world_size, **self.knobs, **self.run)
        return self.stream

    def train_dataloader(self) -> UnendingBatches:
        stream = self.open(rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        if self.state is not None:
            stream.load_state_dict(self.state)
        # The loader reads ahead of the optimizer, so the position is counted in finished steps.
        stream.position = self.phase.samples_at(self.trainer.global_step)
        return UnendingBatches(stream, steps=self.phase.end_step)

    def state_dict(self) -> dict[str, Any]:
        done = self.phase.samples_at(self.trainer.global_step)
        return {
            **self.stream.state_at(done),
            "position": done,
            "pairs": len(self.stream),
            "shards": self.stream.fingerprint(),
            "phase": self.phase.name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The stream is opened later; global_step gives the position. Here what must agree within a
        # phase: the next may read other data, and goes on at its count of pairs.
        if state.get("phase", "") != self.phase.name:
            return
        if state["seed"] != self.run["seed"]:
            raise ValueError(
                f"the checkpoint's data order has seed {state['seed']}, this run has "
                f"{self.run['seed']}: set seed={state['seed']} or give the run another name"
            )
        if self.stream is not None and state["pairs"] != len(self.stream):
            raise ValueError(
                f"the checkpoint's data had {state['pairs']} pairs, data.shards has "
                f"{len(self.stream)}: its order would be another; give those shards back, or the "
                "run another name"
            )
        if self.stream is not None and "shards" in state:
            found = self.stream.fingerprint()
            # an older version knew no digests of foreign tars
            if state["shards"] not in (found, self.stream.fingerprint(digests=False)):
                raise ValueError(
                    f"the checkpoint's data were as many pairs in other shards ({state['shards']}; "
                    f"data.shards has {found}): give those shards back, or the run another name"
                )
        self.state = state
