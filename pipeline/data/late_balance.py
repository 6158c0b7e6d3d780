"""Metadata balancing in the loader: each epoch another draw (MetaCLIP 2, arXiv:2507.22062, sec. 3).

Curation with select/late_balance leaves `inclusion_probability` in the shards and drops nothing
from the head; here a pair takes part in an epoch with that probability. Over many epochs the head
is seen in full, a little at a time, where an early balance throws most of it away for good.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.sources import LocalDataset

COLUMN = "inclusion_probability"


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits look independent."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class LateBalance:
    """The pairs of an epoch: `balance(epoch)` is a mask over global indices, (N,) bool.

    A function of (seed, epoch, uid) alone, so of neither order nor sharding. Memory: 12 bytes a
    pair. Raises ValueError when a pair has no inclusion probability.
    """

    def __init__(self, dataset: LocalDataset, *, seed: Any):
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
        self.hashes, self.probabilities = np.concatenate(hashes), np.concatenate(probabilities)
        self.seed = seed

    def __call__(self, epoch: int) -> np.ndarray:
        key = hashlib.blake2b(repr((self.seed, "balance", epoch)).encode(), digest_size=8).digest()
        draws = mixed(self.hashes ^ np.frombuffer(key, np.uint64)) >> np.uint64(11)
        # MetaCLIP 2 drops where the probability is below the draw: a certain pair always stays
        return self.probabilities >= draws.astype(np.float64) * 2.0**-53
