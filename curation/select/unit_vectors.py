"""Embedding columns as unit vectors with exact inner products, for selectors that compare them.

Coordinates are rounded to multiples of 2^-26, about what float32 does anyway. A product of two is
then a multiple of 2^-52 and a sum of them stays below 2, so float64 holds every partial sum
exactly: an inner product is the same number whatever the block size, the order of summation, the
BLAS or the number of its threads. That is what makes ties between equal pairs, and therefore
decisions, independent of how the rows fall into parts and of memory settings.
Letters: N rows, D embedding width, K centres.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_STEPS = 2.0**26
_BLOCK_NUMBERS = 2**23  # 64 MiB of float64 similarities at a time


def on_grid(values: np.ndarray) -> np.ndarray:
    """Rounded to multiples of 2^-26; float32 stays float32, which holds them where it has them."""
    return (np.rint(values * values.dtype.type(_STEPS)) / values.dtype.type(_STEPS)).astype(
        values.dtype, copy=False
    )


def normalised(vectors: np.ndarray) -> np.ndarray:
    """(N, D) float32 of unit norm, on the grid. vectors: finite, none of them zero."""
    exact = np.asarray(vectors, np.float64)
    exact = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return on_grid(exact.astype(np.float32))


def embedded(part: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """(rows,) bool: which rows hold finite numbers, not all 0, in each of the columns."""
    good = np.ones(part.num_rows, bool)
    for name in columns:
        good &= part[name].is_valid().to_numpy()
    for name in columns:
        vectors = _numbers(part.filter(pa.array(good))[name], name)
        # a huge or tiny norm overflows or vanishes: no direction is left of such a vector
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        good[good] = np.isfinite(norms) & (norms > 1e-12)
    return good


def unit_vectors(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """(rows, D) float32 on the grid of a list column without bad rows (see `embedded`)."""
    return normalised(_numbers(column, name))


def gathered(parts: Sequence[np.ndarray], places: np.ndarray, name: str) -> np.ndarray:
    """(N, D): the rows of all parts, row i going to places[i]; one copy, not two.

    Raises ValueError when the parts do not have one width.
    """
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(f"{name} has vectors of widths {sorted(widths)}: embed the pool anew")
    out = np.empty((len(places), widths.pop()), np.float32)
    start = 0
    for part in parts:
        out[places[start : start + len(part)]] = part
        start += len(part)
    return out


def nearest(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((N,) index of the centre of highest cosine, the first of equal ones; (N,) that cosine).

    vectors (N, D), centres (K, D): on the grid. Price: N K D, and blocks of N x K, not all of it.
    """
    best, cosine = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float64)
    turned = np.asarray(centres, np.float64).T
    rows = max(1, _BLOCK_NUMBERS // max(1, len(centres)))
    for start in range(0, len(vectors), rows):
        block = np.asarray(vectors[start : start + rows], np.float64) @ turned
        found = np.argmax(block, axis=1)
        best[start : start + rows] = found
        cosine[start : start + rows] = np.take_along_axis(block, found[:, None], axis=1)[:, 0]
    return best, cosine


def read_labels(path: str) -> np.ndarray:
    """(K, D) float32 on the grid: embeddings of class names, row k being class k.

    path: a .npy of shape (K, D), or a .parquet with a list column `text_embed`.
    Raises ValueError for another kind of file, or a row without a direction.
    """
    kind = Path(path).suffix
    if kind == ".npy":
        vectors = np.load(path, allow_pickle=False)
    elif kind == ".parquet":
        vectors = _numbers(pq.read_table(path, columns=["text_embed"])["text_embed"], "text_embed")
    else:
        raise ValueError(f"labels {path}: need a .npy (K, D) or a .parquet with text_embed")
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"labels {path} has shape {vectors.shape}: need (classes, width)")
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 1e-12)))
    if len(bad):
        raise ValueError(f"labels {path}: rows {bad[:5].tolist()} are zero or not finite")
    return normalised(vectors)


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """(rows, D) float32 of a list column without null rows; null numbers become NaN."""
    if not len(column):
        return np.empty((0, 0), np.float32)
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) > 1 or not widths[0]:
        raise ValueError(f"{name} has vectors of widths {sorted(map(str, widths))}: need one width")
    values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)
