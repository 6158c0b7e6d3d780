"""Annotator: scores that were computed elsewhere, joined onto the pool (aesthetics, punsafe, other
models' CLIP scores).

DataComp and LAION publish such columns beside their pools, and most models that score images are
not ours to ship: this takes their answers as facts like any other, which selectors threshold and
shards carry.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Key = Literal["uid", "url", "sha256"]


class ExternalScores:
    """A float32 column for each of `scores`, by the `key` column of a Parquet file.

    file: a Parquet file with `key` (string) and the score columns (numbers).
    scores: names of its columns; they keep them here.
    key: what both sides are joined by. A pair without one (no url) counts as missing.
    Reasons, in the column `<first score>_error`: "missing" (no such key in the file: all scores are
        null), "not_finite" (at least one score is null, NaN or infinite: that one is null).
    max_missing_fraction: more in a batch of at least 100 pairs stop the run: the file is of another
        pool. 1 never does.
    Raises ValueError for a file or columns that are not there, and for a key with two different
        scores. Rows that repeat another are fine.
    Price: the file's keys and scores in memory of each process, about 40 bytes a row by uid; then a
        binary search a pair. Two files are two annotators with a name of their own under
        `annotate`.
    """

    name = "external_scores"
    version = 1
    needs_images = False

    def __init__(
        self,
        *,
        file: str,
        scores: Sequence[str],
        key: Key = "uid",
        max_missing_fraction: float = 1.0,
    ):
        if isinstance(scores, str) or not scores or len(set(scores)) < len(scores):
            raise ValueError(f"scores {scores!r}: need a list of different column names")
        if key not in ("uid", "url", "sha256"):
            raise ValueError(f"unknown key {key!r}: use uid, url or sha256")
        if not 0.0 <= max_missing_fraction <= 1.0:
            raise ValueError(f"max_missing_fraction {max_missing_fraction} is outside [0, 1]")
        self.scores, self.key = tuple(scores), key
        self.max_missing_fraction = max_missing_fraction
        self.error = f"{scores[0]}_error"
        self.reads = () if key == "uid" else (key,)
        self.inputs = {"file": str(file)}
        self.columns: dict[str, pa.DataType] = dict.fromkeys(self.scores, pa.float32())
        self.columns[self.error] = pa.string()
        if not Path(file).is_file():
            raise ValueError(
                f"scores file {file} does not exist: give a Parquet file with the columns "
                f"{key}, {', '.join(scores)} in annotate.<name>.file"
            )
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted distinct keys as bytes, (keys, scores) float32 with NaN for what is no number."""
        path = self.inputs["file"]
        schema = pq.read_schema(path)
        wanted = [self.key, *self.scores]
        absent = [column for column in wanted if column not in schema.names]
        if absent:
            raise ValueError(
                f"{path} has no column {', '.join(absent)} (it has: {', '.join(schema.names)})"
            )
        for column in self.scores:
            kind = schema.field(column).type
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
                raise ValueError(f"column {column!r} of {path} holds {kind}, not numbers")
        table = pq.read_table(path, columns=wanted)
        table = table.filter(table[self.key].is_valid())
        keys = np.asarray(table[self.key].cast(pa.binary()).to_pylist(), dtype=bytes)
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and that is not finite
            columns = [
                table[c].cast(pa.float64()).to_numpy().astype(np.float32) for c in self.scores
            ]
        values = np.stack(columns, axis=1)
        values[~np.isfinite(values)] = np.nan
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        repeated = np.flatnonzero(keys[1:] == keys[:-1])
        differ = ~np.isclose(values[repeated], values[repeated + 1], 0.0, 0.0, equal_nan=True)
        if differ.any():
            found = [k.decode() for k in keys[repeated[differ.any(axis=1)]][:5].tolist()]
            raise ValueError(f"{path} has different scores for one {self.key}, such as {found}")
        first = np.ones(len(keys), bool)
        first[repeated + 1] = False
        return keys[first], values[first]

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Look every pair up. Raises ValueError when too many are missing."""
        if self._table is None:
            self._table = self._load()
        keys, values = self._table
        wanted = [(sample[self.key] or "").encode() for sample in batch]
        # in the keys' own type, which cuts longer ones: searchsorted would copy all keys otherwise
        places = np.searchsorted(keys, np.asarray(wanted, keys.dtype))
        rows = []
        for key, place in zip(wanted, places.tolist(), strict=True):
            if not key or place == len(keys) or keys[place] != key:
                rows.append(dict.fromkeys(self.scores) | {self.error: "missing"})
                continue
            found = [None if np.isnan(value) else float(value) for value in values[place]]
            problem = "not_finite" if None in found else None
            rows.append(dict(zip(self.scores, found, strict=True)) | {self.error: problem})
        missing = sum(row[self.error] == "missing" for row in rows)
        if len(rows) >= 100 and missing > self.max_missing_fraction * len(rows):
            raise ValueError(
                f"{missing} of {len(rows)} pairs have no {self.key} in {self.inputs['file']}, over "
                f"max_missing_fraction={self.max_missing_fraction}: is it the file of this pool? "
                "Another key is key=url or key=sha256"
            )
        return rows
