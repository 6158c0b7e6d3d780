"""The two protocols of curation, and the counter-based randomness that all decisions use.

An *annotator* turns samples into facts (expensive, cached, one unit of rows at a time, never looks
at other samples).
A *selector* turns facts into decisions (cheap, global): measure each part, combine once, apply to
each part.
Both are plain objects built from YAML; where and how often they run is the engine's business.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa


class Annotator(Protocol):
    """Per-sample facts. Heavy state (models, automata) is built on first use and never pickled."""

    name: str
    version: int  # raise it when the same input would give another output: old caches become stale
    needs_images: bool
    reads: tuple[str, ...]  # columns of ingest, besides uid
    columns: dict[str, pa.DataType]  # floats and caption banks (CAPTIONS) travel into the shards
    inputs: dict[str, str]  # constructor argument -> file whose content the answers depend on

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One dict of `columns` per sample, in order. A sample has uid, `reads` and, if asked for,
        image bytes.
        """
        ...


@runtime_checkable
class Columnar(Protocol):
    """An annotator that also answers for a whole table, without an object per row."""

    def annotate_table(self, part: pa.Table) -> dict[str, pa.Array]:
        """`part` holds uid and `reads`; one array of its length for each of `columns`."""
        ...


@runtime_checkable
class Costly(Protocol):
    """An annotator so expensive that a unit of `pool.ROWS_PER_UNIT` rows would be too much to
    lose. Its answers must be what JSON can hold.
    """

    rows_per_unit: int  # what one task works on at a time
    rows_per_save: int  # answers are saved this often within a unit: what a kill can cost


@runtime_checkable
class Operational(Protocol):
    """An annotator with settings that change its speed and not its answers."""

    operational: tuple[str, ...]  # dotted paths in its config: server.url; no part of fingerprints


class Selector(Protocol):
    """A global decision over narrow columns. The result may not depend on how rows fall into
    parts.
    """

    name: str
    version: int
    reads: tuple[str, ...]  # columns of ingest or of any annotator, besides uid

    def measure(self, part: pa.Table) -> Any:
        """What the decision needs of one part of the surviving rows; small against the part."""
        ...

    def combine(self, measures: list[Any]) -> Any:
        """The global quantities, once; measures come in the order of the parts."""
        ...

    def apply(self, part: pa.Table, combined: Any, seed: int) -> pa.Array:
        """A string per row: the reason of its drop, null when it is kept."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A selector that also leaves facts on the rows it keeps: scores that need the whole pool.

    The columns can be read by selectors behind it; float ones travel into the shards' stats.
    """

    columns: dict[str, pa.DataType]

    def score(self, part: pa.Table, combined: Any, seed: int) -> dict[str, pa.Array]:
        """A value per row of `part` (the same part that `apply` sees) for each of `columns`."""
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A selector whose decisions depend on files (a word list, a block list, centroids)."""

    inputs: dict[str, str]  # constructor argument -> file; the content counts, not the path


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name a configuration: of the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def uniform(
    seed: int, step: str, uids: Sequence[str], salt: Sequence[int] | None = None
) -> np.ndarray:
    """Counter-based uniforms in [0, 1), float64: one per uid, a function of (seed, step, uid[,
    salt]) alone.

    So a decision does not depend on order, sharding, workers or engine. 53 random bits each.
    """
    key = hashlib.blake2b(f"{seed}\x00{step}".encode(), digest_size=32).digest()
    draws = np.empty(len(uids), np.uint64)
    for index, uid in enumerate(uids):
        message = uid if salt is None else f"{uid}\x00{salt[index]}"
        digest = hashlib.blake2b(message.encode(), key=key, digest_size=8).digest()
        draws[index] = int.from_bytes(digest, "little") >> 11
    return draws.astype(np.float64) * 2.0**-53
