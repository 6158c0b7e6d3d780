"""Metadata balancing in the loader: each epoch another draw (MetaCLIP 2, arXiv:2507.22062, sec. 3).

Curation with select/late_balance leaves `inclusion_probability` in the shards and drops nothing
from the head; here a pair takes part in an epoch with that probability. Over many epochs the head
is seen in full, a little at a time, where an early balance throws most of it away for good.
"""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.cache import FileCache
from pipeline.data.sources import LocalDataset
from pipeline.shards import whole_file

COLUMN = "inclusion_probability"
PIECE = 1 << 16  # pairs drawn at once: what fits the processor's cache is several times faster


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits look independent."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class LateBalance:
    """The pairs of an epoch: `balance(epoch)` is a mask over global indices, (N,) bool.

    A function of (seed, epoch, uid) alone, so of neither order nor sharding. Memory: 12 bytes a
    pair. cache: a folder of the machine where they are kept, so that one process of it gathers them
    once (about 2 seconds a million pairs) and all others map them.
    `expected`: pairs of an epoch, on average.
    Raises ValueError when a pair has no inclusion probability, or no pair has one above 0.
    """

    def __init__(self, dataset: LocalDataset, *, seed: Any, cache: FileCache | None = None):
        self.seed = seed
        self.hashes, self.probabilities = self._found(dataset, cache)
        self.expected = float(self.probabilities.sum(dtype=np.float64))
        if not self.expected > 0:
            raise ValueError(
                f"{dataset.directory}: {COLUMN} is 0 for all pairs, so no epoch has any; curate "
                "anew, or set data.late_balance=false"
            )

    @staticmethod
    def _found(dataset: LocalDataset, cache: FileCache | None) -> tuple[np.ndarray, np.ndarray]:
        if cache is None:
            return gathered(dataset)
        content = json.dumps(dataset.manifest, sort_keys=True)
        folder = cache.folder(f"{dataset.directory} {content}", prefix="balance-")
        paths = [folder / "hashes.npy", folder / "probabilities.npy"]
        with cache.locked(paths[1]):
            if not paths[1].exists():
                for path, array in zip(paths, gathered(dataset), strict=True):
                    with whole_file(path) as file:
                        np.save(file, array)
        hashes, probabilities = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        return hashes, probabilities

    def __call__(self, epoch: int) -> np.ndarray:
        key = hashlib.blake2b(repr((self.seed, "balance", epoch)).encode(), digest_size=8).digest()
        taken = np.empty(len(self.hashes), bool)
        for start in range(0, len(taken), PIECE):
            piece = slice(start, start + PIECE)
            draws = mixed(self.hashes[piece] ^ np.frombuffer(key, np.uint64)) >> np.uint64(11)
            # MetaCLIP 2 drops where the probability is below the draw: a certain pair always stays
            taken[piece] = self.probabilities[piece] >= draws.astype(np.float64) * 2.0**-53
        return taken


def gathered(dataset: LocalDataset) -> tuple[np.ndarray, np.ndarray]:
    """((N,) uint64 hash of each uid, (N,) float32 inclusion probability) from the indexes."""
    hashes, probabilities = [], []
    for number, name in enumerate(dataset.names):
        table = pq.read_table(dataset.index_path(number), columns=["uid", "stats"])
        found = pc.map_lookup(table["stats"].combine_chunks(), COLUMN, "first")
        if found.null_count:
            raise ValueError(
                f"{dataset.directory}/{name}: {found.null_count} pairs have no {COLUMN} in "
                "their stats; curate with a balance that leaves it (late), or set "
                "data.late_balance=false"
            )
        probabilities.append(found.to_numpy(zero_copy_only=False).astype(np.float32))
        digests = b"".join(
            hashlib.blake2b(uid.encode(), digest_size=8).digest()
            for uid in table["uid"].to_pylist()
        )
        hashes.append(np.frombuffer(digests, np.uint64))
    return np.concatenate(hashes), np.concatenate(probabilities)
