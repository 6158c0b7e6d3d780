"""Pairs of images that this model takes for the same and another does not (MMVP, arXiv:2401.06209,
sec. 2.1).

Letters: N images, D and E embedding widths.
"""

from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.distributed import rank
from pipeline.evals.feature_file import FeatureFile
from pipeline.evals.task import Embedder, in_shares
from pipeline.shards import records, write_table

BLOCK = 2048  # rows of similarity in memory at once, of each model: 2048 x 100,000 is 0.8 GiB


class BlindPairs:
    """data: shards of ours.  other: features of the same pairs by another model, a folder of
    `format=features` (DINO's in the paper), found by uid.
    near: cosines above it are the same to this model.  far: below it they differ to the other.
        Both are strict, as in the paper: 0.95 and 0.6.
    out: a Parquet file of the pairs (first, second, near, far), nearest first, at most `keep`.

    pairs: how many there are; images: how many images are in one; share: images / all.
    Not a number to compare models of other widths by: cosines of one model are not another's.
    """

    def __init__(
        self,
        *,
        data: str,
        other: str,
        near: float = 0.95,
        far: float = 0.6,
        max_images: int | None = None,
        keep: int = 1000,
        out: str | None = None,
        batch_size: int = 256,
    ) -> None:
        self.data, self.other = Path(data), FeatureFile(other)
        self.near, self.far = near, far
        self.max_images, self.keep, self.out = max_images, keep, out
        self.batch_size = batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """pairs, images, share."""
        uids, theirs = self.other.embeds("image_embed")
        place = {uid: row for row, uid in enumerate(uids)}
        known, parts = [], []
        for batch in in_shares(islice(records(self.data), self.max_images), self.batch_size):
            missing = [record.uid for record in batch if record.uid not in place]
            if missing:
                raise ValueError(
                    f"{self.other.directory} has no features of {len(missing)} pairs of "
                    f"{self.data}, as {missing[0]}: write them of the same shards"
                )
            known += [record.uid for record in batch]
            images = [record.image for record in batch]
            parts.append(trained.image_embed(images, batch_size=self.batch_size))
        if not known:
            raise ValueError(f"{self.data}: no pairs")
        # cosines whatever the models' metrics: the thresholds are of cosines
        ours = normalize(torch.cat(parts), dim=-1)
        theirs = normalize(theirs[[place[uid] for uid in known]], dim=-1)
        found, cosines = blind_pairs(ours, theirs, near=self.near, far=self.far)
        if self.out is not None and rank() == 0:
            self._write(Path(self.out), known, found, cosines)
        images = float(len(found.unique()))
        return {"pairs": float(len(found)), "images": images, "share": images / len(known)}

    def _write(self, path: Path, uids: list[str], found: Tensor, cosines: Tensor) -> None:
        order = cosines[:, 0].argsort(descending=True, stable=True)[: self.keep]
        first, second = ([uids[row] for row in found[order, side].tolist()] for side in (0, 1))
        near, far = cosines[order].T.numpy()
        write_table(path, pa.table({"first": first, "second": second, "near": near, "far": far}))


def blind_pairs(
    ours: Tensor, theirs: Tensor, *, near: float = 0.95, far: float = 0.6
) -> tuple[Tensor, Tensor]:
    """(P, 2) int64 rows i < j with cosine of ours > near and of theirs < far, and both cosines.

    ours: (N, D), theirs: (N, E), unit norm. Time N^2 (D + E), memory of two blocks of rows.
    """
    rows, cosines = [torch.empty(0, 2, dtype=torch.int64)], [torch.empty(0, 2)]
    for start in range(0, len(ours), BLOCK):
        mine = ours[start : start + BLOCK] @ ours[start:].T
        other = theirs[start : start + BLOCK] @ theirs[start:].T
        blind = ((mine > near) & (other < far)).triu(diagonal=1)
        found = blind.nonzero()
        rows.append(found + start)
        cosines.append(torch.stack([mine[tuple(found.T)], other[tuple(found.T)]], dim=1))
    return torch.cat(rows), torch.cat(cosines)
