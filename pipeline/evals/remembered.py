"""An embedder that embeds nothing twice: for the tasks of one command, or of all with a folder.

Letters: n items, D width.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.distributed import rank
from pipeline.evals.feature_file import FeatureFile, vectors, write_features
from pipeline.evals.trained import TrainedClip


class Remembered:
    """Rows of TrainedClip by the sha256 of what they were made from, image bytes or a caption.

    directory: feature files that commands leave for each other, `<model hash>/<kind>/*.parquet`,
        uid the sha256; rows of other weights are never taken. None: nothing is kept.
    Every rank has the same rows, so all of them leave out the same forwards.
    Memory: D + 15 floats an item. A row may have another last bit than one from another batch.
    """

    def __init__(self, trained: TrainedClip, *, directory: str | Path | None = None) -> None:
        self.trained, self.checkpoint = trained, trained.checkpoint
        self.kinds: dict[str, _Rows] = {}
        self.directory, self.made_by = None, {}
        if directory is not None:
            self.made_by = trained.made_by()
            self.directory = Path(directory) / self.made_by["model"][:16]

    @property
    def logit_scale(self) -> float:
        return self.trained.logit_scale

    def similarity(self, queries: Tensor, candidates: Tensor) -> Tensor:
        return self.trained.similarity(queries, candidates)

    def centre(self, embeds: Tensor) -> Tensor:
        return self.trained.centre(embeds)

    def image_embed(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        return self._rows("image_embed", images, batch_size)

    def text_embed(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        return self._rows("text_embed", captions, batch_size)

    def image_features(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        return self._rows("image_features", images, batch_size)

    def image_projected(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        return self._rows("image_projected", images, batch_size)

    def text_projected(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor:
        return self._rows("text_projected", captions, batch_size)

    def keep(self) -> None:
        """Write what this process has embedded to the folder, if there is one; rank 0 does."""
        for kind, rows in self.kinds.items():
            if self.directory is not None and len(rows.names) > rows.kept and rank() == 0:
                names = [name.hex() for name in rows.names[rows.kept :]]
                table = pa.table({"uid": names, kind: vectors(rows.since(rows.kept))})
                path = self.directory / kind / f"{sha256(''.join(names).encode()).hexdigest()}"
                write_features(path.with_suffix(".parquet"), [table], self._made_by(kind))
            rows.kept = len(rows.names)

    def _made_by(self, kind: str) -> dict[str, Any]:
        unit = self.made_by["metric"] in ("cosine", "arc") and kind.endswith("_embed")
        return {**self.made_by, "normalised": unit}

    def _rows(self, kind: str, items: Sequence[Any], batch_size: int) -> Tensor:
        if kind not in self.kinds:
            self.kinds[kind] = self._found(kind)
        return self.kinds[kind].of(
            items, lambda new: getattr(self.trained, kind)(new, batch_size=batch_size)
        )

    def _found(self, kind: str) -> "_Rows":
        """What earlier commands have left. Raises ValueError for files that are damaged."""
        rows = _Rows()
        folder = self.directory / kind if self.directory else None
        if folder is not None and any(folder.glob("*.parquet")):
            features = FeatureFile(folder)
            if features.made_by != self._made_by(kind):
                raise ValueError(
                    f"{folder} is of {features.made_by}, not of {self._made_by(kind)}: give "
                    "another features=DIR"
                )
            for batch in features.batches("uid", kind):
                rows.add([bytes.fromhex(uid) for uid in batch["uid"]], batch[kind])
            rows.kept = len(rows.names)
        return rows


class _Rows:
    """A growing table of rows by name. kept: how many of them are in files."""

    def __init__(self) -> None:
        self.place: dict[bytes, int] = {}
        self.names: list[bytes] = []
        self.table = np.empty((0, 0), np.float32)
        self.kept = 0

    def add(self, names: Sequence[bytes], rows: Tensor) -> None:
        """Rows of names; one that is there stays."""
        fresh = [n for n, name in enumerate(names) if name not in self.place]
        need, width = len(self.names) + len(fresh), rows.shape[1]
        if need > len(self.table):
            larger = np.empty((max(need, 2 * len(self.table)), width), np.float32)
            if self.names:
                larger[: len(self.names)] = self.table[: len(self.names)]
            self.table = larger
        self.table[len(self.names) : need] = rows.numpy()[fresh]
        for n in fresh:
            self.place[names[n]] = len(self.names)
            self.names.append(names[n])

    def of(self, items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        """(n, D): the rows of items, those that are new made by `embed`."""
        names = [sha256(x.encode() if isinstance(x, str) else x).digest() for x in items]
        new = {n: x for n, x in zip(names, items, strict=True) if n not in self.place}
        if new or not self.names:
            made = embed(list(new.values()))
            if not new:
                return made  # nothing of nothing: (0, D)
            self.add(list(new), made)
        places = [self.place[name] for name in names]
        return torch.from_numpy(self.table[places])

    def since(self, first: int) -> Tensor:
        return torch.from_numpy(self.table[first : len(self.names)].copy())
