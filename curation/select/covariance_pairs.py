"""The similarities within a latent class that covariance selection adds up: given, from embeddings,
or never computed at all.

Letters: n pairs of the class, N of the pool, D embedding width. S_ij = <image_i, text_j>, S+ = S
where it is above the threshold and 0 elsewhere, C_ij = S+_ij + S+_ji. The greedy asks for sums of
columns of C.

Similarities of embeddings are rounded to multiples of 2^-23 (float32's own step below 1), so
float32 stores them exactly and float64 adds up 2^29 of them exactly: a sum is the same number in
any order, in memory or recomputed.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from curation.select.unit_vectors import on_grid

_STEPS = 2.0**23
_MAX_EDGE = 1024  # of a block of similarities: 8 MiB in float64, larger is not faster
_STRIP, _FEW = 256, 16  # rows that are worked on in cache: of a few columns, of all columns
_BLOCKS = 6  # blocks of edge x edge float64 alive at a time, temporaries counted


class Pairs(Protocol):
    """The class's similarities, as the greedy needs them."""

    def __len__(self) -> int: ...

    def total(self, picks: list[int]) -> np.ndarray:
        """(n,) float64: sum of C_ij over the picks j."""
        ...


class GivenPairs:
    """A similarity matrix that the caller holds; nothing of its size is copied.

    similarity: (n, n), rows images, columns texts, not thresholded; any float dtype, summed in
    float64.
    """

    def __init__(self, similarity: np.ndarray):
        self.similarity = similarity

    def __len__(self) -> int:
        return len(self.similarity)

    def diagonal(self) -> np.ndarray:
        return np.diagonal(self.similarity).astype(np.float64)

    def total(self, picks: list[int]) -> np.ndarray:
        if len(picks) == 1:
            row, column = self.similarity[picks[0]], self.similarity[:, picks[0]]
            return np.maximum(row, 0.0).astype(np.float64) + np.maximum(column, 0.0)
        # ascending places: what is read of a row lies in order
        places = np.sort(np.asarray(picks, np.int64))
        sums = np.empty(len(self))
        for start in range(0, len(self), _STRIP):
            strip = self.similarity[start : start + _STRIP].take(places, axis=1)
            strip = np.maximum(strip, 0.0, out=strip)
            sums[start : start + _STRIP] = strip.sum(axis=1, dtype=np.float64)
        for start in range(0, len(places), _FEW):
            rows = self.similarity[places[start : start + _FEW]].astype(np.float64)
            sums += np.maximum(rows, 0.0, out=rows).sum(axis=0)
        return sums


class Rows:
    """Some rows of the pool's (N, D) float32 embeddings, taken as float64: in blocks, or `held`."""

    def __init__(self, vectors: np.ndarray, rows: np.ndarray):
        self.vectors, self.rows = vectors, rows
        self.held: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: np.ndarray | list[int] | slice) -> np.ndarray:
        if self.held is not None:
            return self.held[places]
        return self.vectors[self.rows[places]].astype(np.float64)

    def hold(self) -> None:
        """Keep them all, 8 n D bytes."""
        self.held = self.vectors[self.rows].astype(np.float64)

    def release(self) -> None:
        self.held = None

    def _blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _MAX_EDGE):
            yield self[start : start + _MAX_EDGE]

    def sum(self) -> np.ndarray:
        """(D,), exact for vectors on the grid."""
        return np.sum([block.sum(axis=0) for block in self._blocks()], axis=0)

    def inner(self, direction: np.ndarray) -> np.ndarray:
        """(n,) inner products with (D,); exact if both are on the grid and not longer than 1."""
        return np.concatenate([block @ direction for block in self._blocks()])

    def diagonal(self, other: "Rows") -> np.ndarray:
        """(n,) inner products of equal places."""
        return np.concatenate(
            [
                np.einsum("nd,nd->n", mine, its)
                for mine, its in zip(self._blocks(), other._blocks(), strict=True)
            ]
        )


class EmbeddedPairs:
    """Similarities from embeddings: C is held while there is room, else recomputed where needed.

    image, text: n rows each, on the grid of `unit_vectors`.  threshold: at least 0.
    room: bytes for C and for blocks. `fits` says whether C may be held; `hold` and `release` do it.
    Price: 4 n^2 bytes and 4 n^2 D flops to hold C; without, 4 n D flops a pick that is looked at.
    """

    def __init__(self, image: Rows, text: Rows, *, threshold: float, room: int):
        self.image, self.text = image, text
        self.limit = threshold * _STEPS
        self.edge = int(min(_MAX_EDGE, max(64, (room / (8 * _BLOCKS)) ** 0.5)))
        working = 8 * self.edge * (_BLOCKS * self.edge + 4 * image.vectors.shape[1])
        self.fits = 4 * len(image) ** 2 + working <= room
        self.held: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image)

    def diagonal(self) -> np.ndarray:
        return self.image.diagonal(self.text)

    def block(self, rows: np.ndarray | slice, columns: np.ndarray | slice) -> np.ndarray:
        """(rows, columns) of C in multiples of 2^-23, float64."""
        forth = self._positive(self.image[rows], self.text[columns])
        forth += self._positive(self.text[rows], self.image[columns])
        return forth

    def _positive(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        found = left @ right.T
        found *= _STEPS
        np.rint(found, out=found)
        if self.limit > 0:
            found[found <= self.limit] = 0.0
        # above 1 by rounding only; C would not fit float32 otherwise
        return np.clip(found, 0.0, _STEPS, out=found)

    def hold(self) -> None:
        """Keep C, float32."""
        assert self.fits, "no room for C"
        matrix = np.empty((len(self), len(self)), np.float32)
        for above, beside in self._blocks():
            block = self.block(above, beside)
            matrix[above, beside] = block
            if above != beside:
                matrix[beside, above] = block.T
        self.held = matrix

    def release(self) -> None:
        self.held = None

    def row_sums(self) -> np.ndarray:
        """(n,) float64: the sum of each row of C."""
        if self.held is not None:
            return self.held.sum(axis=1, dtype=np.float64) / _STEPS
        sums = np.zeros(len(self))
        for above, beside in self._blocks():
            block = self.block(above, beside)
            sums[above] += block.sum(axis=1)
            if above != beside:
                sums[beside] += block.sum(axis=0)
        return sums / _STEPS

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Upper triangle: C is symmetric."""
        cuts = [slice(at, min(at + self.edge, len(self))) for at in range(0, len(self), self.edge)]
        return [(above, beside) for i, above in enumerate(cuts) for beside in cuts[i:]]

    def total(self, picks: list[int]) -> np.ndarray:
        if self.held is not None:
            return self.held[picks].sum(axis=0, dtype=np.float64) / _STEPS
        sums = np.empty(len(self))
        for start in range(0, len(self), self.edge):
            rows = np.arange(start, min(start + self.edge, len(self)))
            sums[rows] = self.partial(rows, picks, np.zeros(len(rows), np.int32))
        return sums

    def partial(self, rows: np.ndarray, picks: list[int], seen: np.ndarray) -> np.ndarray:
        """(rows,) float64: sum of C_ij over picks[seen_i:], for at most `edge` rows."""
        sums = np.zeros(len(rows))
        for start in range(int(seen.min()), len(picks), self.edge):
            chosen = picks[start : start + self.edge]
            block = self.block(rows, np.asarray(chosen))
            block[np.arange(start, start + len(chosen))[None, :] < seen[:, None]] = 0.0
            sums += block.sum(axis=1)
        return sums / _STEPS


class UnthresholdedPairs:
    """C = S + S' of embeddings: a sum over picks is an inner product with their sum, O(n D).

    No similarity of two pairs is ever computed. image, text: n rows each, on the grid.
    room: bytes; if both sides fit as float64, 16 n D, they may be held.
    """

    def __init__(self, image: Rows, text: Rows, *, room: int):
        self.image, self.text = image, text
        self.fits = (
            24 * image.vectors.shape[1] * len(image) <= room
        )  # and a float32 copy on the way

    def hold(self) -> None:
        self.image.hold()
        self.text.hold()

    def release(self) -> None:
        self.image.release()
        self.text.release()

    def __len__(self) -> int:
        return len(self.image)

    def diagonal(self) -> np.ndarray:
        return self.image.diagonal(self.text)

    def row_sums(self) -> np.ndarray:
        return self._with(self.image.sum(), self.text.sum(), len(self))

    def total(self, picks: list[int]) -> np.ndarray:
        return self._with(self.image[picks].sum(axis=0), self.text[picks].sum(axis=0), len(picks))

    def _with(self, image_sum: np.ndarray, text_sum: np.ndarray, count: int) -> np.ndarray:
        # the mean, back on the grid, keeps the inner products exact; it costs 2^-27 of each
        return count * (
            self.image.inner(on_grid(text_sum / count))
            + self.text.inner(on_grid(image_sum / count))
        )
