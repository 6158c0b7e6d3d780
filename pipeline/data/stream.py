"""Shards -> batches, in an order that is a function of (seed, position) alone.

The global batch at a position is the same for any number of ranks and workers: rank r takes the
r-th slice of it. How pairs are shuffled, and how datasets are mixed: pipeline/data/order.py; where
shards come from: pipeline/data/sources.py.
Letters: B local pairs, L context length, S image size.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from pipeline.data.cache import FileCache
from pipeline.data.captions import OF_RECAPTIONS
from pipeline.data.images import BadImage, ImageTransform
from pipeline.data.late_balance import LateBalance
from pipeline.data.loading import Plan, WorkerDied, batches
from pipeline.data.mixture import refuse_few_pairs, sources
from pipeline.data.order import Interleaving, ShuffledOrder, generator
from pipeline.data.sources import (
    COLUMNS,
    LocalDataset,
    open_dataset,
    refuse_small_cache,
    windows_ahead,
)
from pipeline.shards import Shard

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Sample = tuple[int, int, int]  # (dataset, epoch, index in the epoch's order)
CaptionSampler = Callable[[list[dict[str, Any]], str, np.random.Generator, int], str]

MAX_STAND_INS = 100
MAX_DEATHS = 3  # of workers in a row, without a batch between them
JUDGED_AFTER = 1000  # pairs of a process, before its share of bad ones is judged


class BadPair(ValueError):
    """A pair that cannot be used for another reason than its image; `reason` is for counting."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Part:
    """One dataset of a stream, with its order. seed: what its draws depend on."""

    def __init__(
        self,
        dataset: LocalDataset,
        *,
        seed: Any,
        window_shards: int,
        late_balance: bool,
        cache: FileCache | None,
    ):
        self.dataset, self.seed = dataset, seed
        keep = LateBalance(dataset, seed=seed, cache=cache) if late_balance else None
        self.pairs = len(dataset) if keep is None else keep.expected  # of an epoch
        self.order = ShuffledOrder(
            dataset.starts, seed=seed, window_shards=window_shards, keep=keep
        )
        self.window: tuple[int, int] | None = None

    def locate(self, epoch: int, index: int) -> tuple[Shard, int]:
        """The shard and row at a place; says ahead which shards follow."""
        window = (epoch, self.order.window_at(epoch, index))
        if window != self.window:
            self.window = window
            self.dataset.read_ahead(windows_ahead(self.order, *window))
        return self.dataset.locate(self.order(epoch, index))


class _Samples(torch.utils.data.Dataset):
    """Map a place to (pixels, caption, uid, reasons); runs in the loader's workers."""

    def __init__(
        self,
        parts: Sequence[_Part],
        transform: ImageTransform,
        captions: CaptionSampler | None,
        stride: int,
    ):
        self.parts, self.transform, self.captions = parts, transform, captions
        self.stride, self.warned = stride, 0

    def __getitem__(self, sample: Sample) -> tuple[torch.Tensor, str, str, list[str]]:
        source, epoch, index = sample
        part, reasons = self.parts[source], []
        length = part.order.length(epoch)
        # The same place of the next batch stands in, so that the batch stays whole and in place and
        # holds no pair twice (unless an epoch ends in it, or is shorter than two batches).
        stride = self.stride if length >= 2 * self.stride else 1
        for attempt in range(min(MAX_STAND_INS, length)):
            laps, ahead = divmod(attempt * stride, length)
            shard, row = part.locate(epoch, (index + ahead + laps) % length)
            try:
                image, caption, uid = self._pair(part, shard, row, epoch)
                return image, caption, uid, reasons
            except (BadImage, BadPair) as error:
                part.dataset.refuse_cut(shard)
                reasons.append(error.reason)
                self._warn(f"{shard.path}: row {row}, uid {shard.uids[row]}: {error}")
        raise ValueError(
            f"{len(reasons)} pairs in a row of {part.dataset.directory} cannot be used: "
            f"{dict(Counter(reasons))}"
        )

    def _pair(self, part: _Part, shard: Shard, row: int, epoch: int) -> tuple[Any, str, str]:
        uid, primary = shard.uids[row], shard.captions[row]
        if not uid:
            raise BadPair("no_uid")
        if not primary or primary.isspace():
            raise BadPair("empty_caption")
        image = self.transform.train(shard.image(row), generator(part.seed, "augment", epoch, uid))
        if self.captions is not None:
            rng = generator(part.seed, "caption", epoch, uid)
            primary = self.captions(shard.bank(row), primary, rng, epoch)
        return image, primary, uid

    def _warn(self, words: str) -> None:
        self.warned += 1
        if self.warned <= 10 or self.warned % 1000 == 0:
            log.warning("bad pair %d of this worker: %s", self.warned, words)


class ShardStream:
    """An endless, exactly resumable stream of local batches.

    Each batch: what the transform stacks (images (B, 3, S, S) uint8), tokens (B, L) int64,
    captions, uids, first (global position of its first pair), bad (pairs that could not be used;
    the same place of the next batch stood in) and bad_reasons.
    State: `position`, the number of global pairs already delivered. An epoch has no remainder: a
    batch may span two. A mixture has one endless epoch.
    shards: a directory of ours, a URL of one, or foreign tars (see sources.py); or
    mixture: [{shards, weight}, ...]: of any BLOCK = 256 pairs each dataset gives its share of the
        weights, to a pair; each goes through epochs of its own.
    captions: which of a pair's captions is read this time (see pipeline/data/captions.py); None:
        the primary one.
    late_balance: metadata balancing in the loader (MetaCLIP 2, arXiv:2507.22062): each epoch a pair
        takes part with the `inclusion_probability` in its stats, by a new draw.
    verify: what of a shard is compared with the manifest: size, sha256, none (see sources.py).
    cache, cache_gib: the folder where shards of URLs are kept, and its bound. It is shared by the
        processes of a machine; threads fetch the window that is read and the next one.
    max_bad_fraction: above it (and after 1,000 pairs of a process) the run stops.
    workers: loader processes. One that dies is replaced and the stream goes on at the same pair; a
        third death in a row without a batch ends it (ValueError).
    Raises ValueError when the global batch does not divide by the ranks, a dataset has fewer pairs
    than its share of a batch, late_balance finds pairs without that probability, a sampler needs
    recaptions and there are none, or shards are missing or not what their manifest says.
    """

    def __init__(
        self,
        *,
        transform: ImageTransform,
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
        global_batch_size: int,
        shards: str | None = None,
        mixture: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window_shards: int = 16,
        workers: int = 0,
        captions: CaptionSampler | None = None,
        late_balance: bool = False,
        verify: Literal["size", "sha256", "none"] = "size",
        cache: str | None = None,
        cache_gib: float = 100.0,
        max_bad_fraction: float = 0.1,
    ):
        if global_batch_size % world_size or global_batch_size < world_size:
            up = -(-global_batch_size // world_size) * world_size
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of {world_size} "
                f"processes: set it to {up}, or start another number of processes"
            )
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={max_bad_fraction}: a share is in [0, 1]")
        names, weights = sources(shards, mixture)
        columns = COLUMNS + (["captions"] if captions is not None else [])
        files = FileCache(directory=cache, gib=cache_gib) if cache else None
        knobs = {"window_shards": window_shards, "columns": columns, "verify": verify}
        datasets = [open_dataset(name, cache=files, **knobs) for name in names]
        refuse_small_cache(files, datasets, window_shards)
        refuse_few_pairs(names, [len(d) for d in datasets], weights, global_batch_size)
        refuse_no_recaptions(captions, names, datasets)
        self.parts = [
            _Part(
                dataset,
                seed=seed if len(datasets) == 1 else (seed, number),
                window_shards=window_shards,
                late_balance=late_balance,
                cache=files,
            )
            for number, dataset in enumerate(datasets)
        ]
        self.interleaving = Interleaving(weights, seed=seed)
        refuse_few_pairs(names, [part.pairs for part in self.parts], weights, global_batch_size)
        self.samples = _Samples(self.parts, transform, captions, global_batch_size)
        self.tokenizer, self.seed = tokenizer, seed
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.workers, self.max_bad_fraction = workers, max_bad_fraction
        self.position = 0
        self.seen, self.bad = 0, Counter()  # pairs of this rank, and reasons of those replaced

    def __len__(self) -> int:
        """Pairs of the datasets; with late_balance an epoch sees fewer."""
        return sum(len(part.dataset) for part in self.parts)

    def fingerprint(self, *, digests: bool = True) -> str:
        """Of the shards as their manifests list them, wherever they lie; without their sha256 if
        told so.
        """
        digest = hashlib.sha256()
        for part in self.parts:
            for shard in part.dataset.manifest["shards"]:
                sha256 = shard.get("sha256") if digests else None
                entry = (shard["num_samples"], shard["num_bytes"], sha256)
                digest.update(f"{entry}\n".encode())
        return digest.hexdigest()[:16]

    def local_positions(self, first: int) -> range:
        """Global positions of this rank's pairs in the global batch that starts at `first`."""
        local = self.global_batch_size // self.world_size
        start = first + self.rank * local
        return range(start, start + local)

    def place(self, position: int) -> Sample:
        """Where the pair at a global position is read from."""
        source, number = self.interleaving(position)
        return source, *self.parts[source].order.place(number)

    def _plan(self) -> Iterator[list[Sample]]:
        first = self.position
        while True:
            yield [self.place(position) for position in self.local_positions(first)]
            first += self.global_batch_size

    def _collate(self, samples: list[tuple[torch.Tensor, str, str, list[str]]]) -> Batch:
        images, captions, uids, reasons = zip(*samples, strict=True)
        bad = [reason for found in reasons for reason in found]
        return {
            **self.samples.transform.stacked(images),
            "tokens": self.tokenizer(captions),
            "captions": list(captions),
            "uids": list(uids),
            "bad": len(bad),
            "bad_reasons": bad,
        }

    def __iter__(self) -> Iterator[Batch]:
        deaths = 0
        while True:
            try:
                for batch in self._loaded():
                    first, deaths = self.position, 0
                    self.position += self.global_batch_size
                    self._count(batch)
                    yield {**batch, "first": first}
            except WorkerDied as error:
                deaths += 1
                for part in self.parts:
                    part.dataset.verify_files()  # a truncated tar kills who reads it
                if deaths == MAX_DEATHS:
                    raise ValueError(
                        f"{error}, {deaths} times at pair {self.position}: too little memory for "
                        f"data.workers={self.workers}, or a picture that kills its decoder"
                    ) from error
                log.warning("%s: others go on from pair %d", error, self.position)

    def _loaded(self) -> Iterator[Batch]:
        """Batches from `position` on."""
        return batches(
            DataLoader(
                self.samples,
                batch_sampler=Plan(self._plan),
                num_workers=self.workers,
                collate_fn=self._collate,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def _count(self, batch: Batch) -> None:
        self.seen += len(batch["uids"])
        self.bad.update(batch["bad_reasons"])
        if self.seen >= JUDGED_AFTER and self.bad.total() > self.max_bad_fraction * self.seen:
            raise ValueError(
                f"{self.bad.total()} of {self.seen} pairs could not be used "
                f"({dict(self.bad)}), more than data.max_bad_fraction={self.max_bad_fraction}: "
                "curate the pool, or raise it"
            )

    def state_at(self, position: int) -> dict[str, int]:
        """The state of a stream that has delivered `position` pairs."""
        epoch, index = 0, position
        if len(self.parts) == 1:
            epoch, index = self.parts[0].order.place(position)
        return {"epoch": epoch, "index": index, "seed": self.seed}

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands: enough to go on exactly there, on any number of ranks."""
        return self.state_at(self.position)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a state's position. Raises ValueError for a state of another seed.

        Without late_balance, and with it where the state has the `position` as well, nothing
        before it is counted.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint's stream has seed {state['seed']}, this run has {self.seed}: "
                "its order would be another"
            )
        epoch, index = state["epoch"], state["index"]
        if len(self.parts) > 1:
            self.position = index
        elif "position" in state:
            self.position = state["position"]
            self.parts[0].order.remember(self.position, epoch, index)
        else:
            self.position = self.parts[0].order.position(epoch, index)


def refuse_no_recaptions(
    captions: CaptionSampler | None, names: Sequence[str], datasets: Sequence[LocalDataset]
) -> None:
    """Raise ValueError for a sampler of recaptions on tars of others, none of which has any."""
    banks = [dataset.manifest.get("num_banks") for dataset in datasets]  # None: of ours, unknown
    if isinstance(captions, OF_RECAPTIONS) and all(count == 0 for count in banks):
        raise ValueError(
            f"data.captions draws from recaptions, and no pair of {', '.join(names)} has `captions`"
            " in its .json: set captions@data.captions=primary, or recaption the pool first "
            "(curation)"
        )
