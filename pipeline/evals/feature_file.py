"""Features of a dataset, computed once: a folder of Parquet files, and what made them.

Columns: uid, image_embed and text_embed (fixed-size lists of D float32), and whatever else was
asked for. The schema's metadata say, under `pairwright`: metric (see pipeline/metric.py; with its
curvature, where it has one), normalised, model (sha256 of its weights), checkpoint (its file's
name), dataset (sha256 over its shards).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.shards import whole_file

KEY = b"pairwright"


class FeatureFile:
    """The features in a folder. Raises ValueError for files that are missing, damaged, of two
    models, or of two datasets.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = sorted(self.directory.glob("*.parquet"))
        if not self.files:
            raise ValueError(
                f"{directory}: no features; write them with `clip-export format=features "
                "run=runs/N format.shards=SHARDS out=DIR`"
            )
        self.made_by = described(self.files[0])
        for file in self.files[1:]:
            other = described(file)
            if other != self.made_by:
                raise ValueError(
                    f"{file.name} is of {_short(other)}, {self.files[0].name} of "
                    f"{_short(self.made_by)}: two models or datasets in {directory}; write it anew"
                )

    def batches(self, *columns: str) -> Iterator[dict[str, Any]]:
        """Row group by row group: uid as a list of strings, embeddings as (n, D) float32."""
        for file in self.files:
            source = pq.ParquetFile(file)
            missing = [name for name in columns if name not in source.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{file} has no {', '.join(missing)}; it has {source.schema_arrow.names}"
                )
            for group in range(source.num_row_groups):
                table = source.read_row_group(group, columns=list(columns))
                yield {name: _values(table[name]) for name in columns}

    def embeds(self, column: str = "image_embed") -> tuple[list[str], Tensor]:
        """uids and (n, D) float32 of all rows, in memory."""
        uids, parts = [], []
        for batch in self.batches("uid", column):
            uids += batch["uid"]
            parts.append(batch[column])
        return uids, torch.cat(parts)


def described(file: Path) -> dict[str, Any]:
    """What a file says of its maker. Raises ValueError for one that says nothing."""
    try:
        return json.loads((pq.read_schema(file).metadata or {})[KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} does not say which model made it: no feature file of pairwright's ({error})"
        ) from error


def write_features(path: Path, tables: Iterable[pa.Table], made_by: Mapping[str, Any]) -> None:
    """A Parquet file with its maker in the schema, a row group a table, appearing when whole."""
    metadata = {KEY: json.dumps(dict(made_by), sort_keys=True).encode()}
    writer = None
    with whole_file(path) as file:
        for table in tables:
            table = table.replace_schema_metadata(metadata)
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None, "no table, so no columns"
        writer.close()


def vectors(embed: Tensor) -> pa.FixedSizeListArray:
    """(n, D) as a column of lists of float32 or float16."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embed.flatten().numpy()), embed.shape[1])


def _values(column: pa.ChunkedArray) -> list[str] | Tensor:
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_pylist()
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(flat, np.float32)).unflatten(0, (-1, column.type.list_size))


def _short(made_by: Mapping[str, Any]) -> str:
    return f"{made_by.get('checkpoint')} ({str(made_by.get('model'))[:12]})"
