"""Shards -> batches, in an order that is a function of (seed, position) alone.

The order of an epoch: shards are permuted, `window_shards` consecutive ones are a window, samples
are permuted inside
their window. So any position is found without reading what lies before it, and the global batch at
a position is the
same for any number of ranks and workers: rank r takes the r-th slice of it.
Quality: a pair moves anywhere within its window, windows are contiguous in the permuted shards;
with
window_shards >= the number of shards it is a full permutation. Packed shards are in uid (hash)
order already.
Letters: B local pairs, L context length, S image size.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.data.images import BadImage, ImageTransform
from pipeline.data.late_balance import LateBalance
from pipeline.shards import Dataset, Shard

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Sample = tuple[int, int]  # (epoch, index in the epoch's order)
CaptionSampler = Callable[[list[dict[str, Any]], str, np.random.Generator, int], str]


def generator(*key: Any) -> np.random.Generator:
    """A generator that is a function of `key` alone (counter-based; nothing global is touched)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class ShuffledOrder:
    """The global index at any place of any epoch. `starts`: first global index of each shard, and
    the total.

    keep: the pairs that take part in an epoch, as a mask over global indices; None: all, always.
    """

    def __init__(
        self,
        starts: np.ndarray,
        *,
        seed: int,
        window_shards: int,
        keep: Callable[[int], np.ndarray] | None = None,
    ):
        if window_shards < 1:
            raise ValueError(f"window_shards {window_shards}: must be at least 1")
        self.starts, self.seed, self.window_shards = starts, seed, window_shards
        self.keep = lru_cache(2)(keep) if keep else None
        self.epoch = lru_cache(2)(self._epoch)
        self.window = lru_cache(3)(self._window)
        self._lengths: list[int] = []

    def length(self, epoch: int) -> int:
        """Pairs of an epoch."""
        if self.keep is None:
            return int(self.starts[-1])
        while len(self._lengths) <= epoch:
            self._lengths.append(int(np.count_nonzero(self.keep(len(self._lengths)))))
        return self._lengths[epoch]

    def place(self, position: int) -> Sample:
        """(epoch, index in it) of the position-th pair since the start of training."""
        if self.keep is None:
            return divmod(position, self.length(0))
        epoch = 0
        while position >= self.length(epoch):
            position -= self.length(epoch)
            epoch += 1
        return epoch, position

    def position(self, epoch: int, index: int) -> int:
        """The inverse of `place`."""
        if self.keep is None:
            return epoch * self.length(0) + index
        return sum(self.length(before) for before in range(epoch)) + index

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = generator(self.seed, "shards", epoch).permutation(len(self.starts) - 1)
        sizes = np.diff(self.starts)
        if self.keep is not None:
            kept = np.concatenate([[0], np.cumsum(self.keep(epoch))])
            sizes = np.diff(kept[self.starts])
        counts = sizes[shards]
        window_counts = np.add.reduceat(counts, np.arange(0, len(counts), self.window_shards))
        return shards, np.concatenate([[0], np.cumsum(window_counts)])

    def _window(self, epoch: int, window: int) -> np.ndarray:
        first = window * self.window_shards
        shards = self.epoch(epoch)[0][first : first + self.window_shards]
        members = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        if self.keep is not None:
            members = members[self.keep(epoch)[members]]
        return generator(self.seed, "window", epoch, window).permutation(members)

    def __call__(self, epoch: int, index: int) -> int:
        bounds = self.epoch(epoch)[1]
        window = int(np.searchsorted(bounds, index, side="right")) - 1
        return int(self.window(epoch, window)[index - bounds[window]])


class _Samples(torch.utils.data.Dataset):
    """Map (epoch, index) to (pixels, caption, uid, bad); runs in the loader's workers."""

    def __init__(
        self,
        dataset: Dataset,
        order: ShuffledOrder,
        transform: ImageTransform,
        captions: CaptionSampler | None,
        seed: int,
    ):
        self.dataset, self.order, self.transform, self.seed = dataset, order, transform, seed
        self.captions = captions

    def __getitem__(self, sample: Sample) -> tuple[torch.Tensor, str, str, int]:
        epoch, index = sample
        length = self.order.length(epoch)
        for bad in range(min(100, length)):
            where = self.order(epoch, (index + bad) % length)
            shard, row = self.dataset.locate(where)
            uid = shard.uids[row]
            try:
                rng = generator(self.seed, "augment", epoch, uid)
                image = self.transform.train(shard.image(row), rng)
                return image, self._caption(shard, row, epoch, uid), uid, bad
            except BadImage as error:
                # the next pair of the order stands in, so that the batch stays whole and in place
                log.warning("%s: uid %s cannot be decoded (%s)", shard.path, uid, error)
        raise ValueError(f"100 pairs in a row of {self.dataset.directory} cannot be decoded")

    def _caption(self, shard: Shard, row: int, epoch: int, uid: str) -> str:
        primary = shard.captions[row]
        if self.captions is None:
            return primary
        rng = generator(self.seed, "caption", epoch, uid)
        return self.captions(shard.bank(row), primary, rng, epoch)


class ShardStream:
    """An endless, exactly resumable stream of local batches.

    Each batch: images (B, 3, S, S) uint8, tokens (B, L) int64, uids, first (global position of its
    first pair),
    bad (records that could not be decoded and were replaced by the next of the order).
    State: `position`, the number of global pairs already delivered. An epoch has no remainder: a
    batch may span two.
    captions: which of a pair's captions is read this time (see pipeline/data/captions.py); None:
        the primary one.
    late_balance: metadata balancing in the loader (MetaCLIP 2, arXiv:2507.22062): each epoch a pair
        takes part with the `inclusion_probability` in its stats, by a new draw.
    Raises ValueError when the global batch does not divide by the ranks, there are fewer pairs
    than a batch, or late_balance finds pairs without that probability.
    """

    def __init__(
        self,
        *,
        shards: str,
        transform: ImageTransform,
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window_shards: int = 16,
        workers: int = 0,
        captions: CaptionSampler | None = None,
        late_balance: bool = False,
    ):
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of {world_size} processes"
            )
        self.dataset = Dataset(shards)
        if len(self.dataset) < global_batch_size:
            raise ValueError(
                f"data.shards={shards} holds {len(self.dataset)} pairs, fewer than one batch of "
                f"{global_batch_size}: a batch would hold pairs twice; lower global_batch_size"
            )
        keep = LateBalance(self.dataset, seed=seed) if late_balance else None
        self.order = ShuffledOrder(
            self.dataset.starts, seed=seed, window_shards=window_shards, keep=keep
        )
        self.samples = _Samples(self.dataset, self.order, transform, captions, seed)
        self.tokenizer, self.seed = tokenizer, seed
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.workers = workers
        self.position = 0

    def __len__(self) -> int:
        """Pairs of the dataset; with late_balance an epoch sees fewer."""
        return len(self.dataset)

    def local_positions(self, first: int) -> range:
        """Global positions of this rank's pairs in the global batch that starts at `first`."""
        local = self.global_batch_size // self.world_size
        start = first + self.rank * local
        return range(start, start + local)

    def _plan(self) -> Iterator[list[Sample]]:
        first = self.position
        while True:
            yield [self.order.place(position) for position in self.local_positions(first)]
            first += self.global_batch_size

    def _collate(self, samples: list[tuple[torch.Tensor, str, str, int]]) -> Batch:
        images, captions, uids, bad = zip(*samples, strict=True)
        return {
            "images": torch.stack(images),
            "tokens": self.tokenizer(captions),
            "uids": list(uids),
            "bad": sum(bad),
        }

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.samples,
            batch_sampler=_Plan(self._plan),
            num_workers=self.workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            first = self.position
            self.position += self.global_batch_size
            yield {**batch, "first": first}

    def state_at(self, position: int) -> dict[str, int]:
        """The state of a stream that has delivered `position` pairs."""
        epoch, index = self.order.place(position)
        return {"epoch": epoch, "index": index, "seed": self.seed}

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: enough to go on exactly there, on any number of ranks."""
        return self.state_at(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a state's position. Raises ValueError for a state of another seed."""
        if state["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint's stream has seed {state['seed']}, this run has {self.seed}: "
                "its order would be another"
            )
        self.position = self.order.position(state["epoch"], state["index"])


class _Plan:
    """A batch sampler: the DataLoader wants something that can be iterated more than once."""

    def __init__(self, plan: Callable[[], Iterator[list[Sample]]]):
        self.plan = plan

    def __iter__(self) -> Iterator[list[Sample]]:
        return self.plan()
