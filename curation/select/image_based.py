"""Selector: DataComp's image-based filter (arXiv:2304.14108; baselines/apply_filter.py):
keep images that lie in the same cluster of the pool as some image of a reference set.

DataComp clusters the captioned pool's L/14 image embeddings into 100,000 (k-means, 20 rounds) and
takes ImageNet-1k's training images as reference. Image-based and the best 30 % of CLIP scores, both
of the whole pool, make DataComp-1B: 79.2 % on ImageNet with L/14. The result leans towards the
reference: do not read zero-shot accuracy on it as a fair number.
Letters: N rows, K centroids, R reference images, D width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.select.unit_vectors import embedded, nearest, normalised, on_grid, unit_vectors


def read_vectors(path: str) -> np.ndarray:
    """(rows, D) float64 of a .npy. Raises ValueError for another shape, and for rows that are zero
    or not finite.
    """
    if Path(path).suffix != ".npy":
        raise ValueError(f"{path}: need a .npy of shape (rows, width)")
    vectors = np.load(path, allow_pickle=False)
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind not in "fiu":
        raise ValueError(f"{path} has shape {vectors.shape}, {vectors.dtype}: need (rows, width)")
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(f"{path}: rows {bad[:5].tolist()} are zero or not finite")
    return vectors


def scaled(centroids: np.ndarray) -> np.ndarray:
    """All divided by the largest norm, on the grid: which one is nearest by inner product stays."""
    return on_grid(centroids / np.linalg.norm(centroids, axis=1).max())


class ImageBased:
    """Keeps images whose nearest centroid is also the nearest of a reference image ("far_image"
    otherwise); an image without an embedding goes as "no_embedding".

    centroids: .npy (K, D), as k-means left them. Nearest is the highest inner product, the first of
        equal ones. Centroids need not have unit norm, and as in DataComp their norm counts: a tight
        cluster's mean is longer than a loose one's and draws more images.
    reference: .npy (R, D) image features of the same proxy, of any norm.
    Needs annotate/embed. DataComp puts select/basic_caption before it.
    Price: (N + R) K D multiplications and K D numbers in memory; 1 M images and ImageNet's 1.3 M
        against 100,000 centroids of 768 are 1.8e14: hours on a core.
    """

    name = "image_based"
    version = 1
    reads = ("image_embed",)

    def __init__(self, *, centroids: str, reference: str):
        for knob, path in (("centroids", centroids), ("reference", reference)):
            if not Path(path).is_file():
                raise ValueError(
                    f"{knob} {path} does not exist: give a .npy of image features (rows, width)"
                )
        self.inputs = {"centroids": centroids, "reference": reference}

    def measure(self, part: pa.Table) -> None:
        """Nothing: each image is judged alone."""

    def combine(self, measures: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """(centroids (K, D), (K,) bool: which of them are near a reference image)."""
        centroids, reference = (read_vectors(path) for path in self.inputs.values())
        if centroids.shape[1] != reference.shape[1]:
            raise ValueError(
                f"{self.inputs['centroids']} has width {centroids.shape[1]}, "
                f"{self.inputs['reference']} has {reference.shape[1]}: both must be of one proxy"
            )
        centroids = scaled(centroids)
        wanted = np.zeros(len(centroids), bool)
        wanted[nearest(normalised(reference), centroids)[0]] = True
        return centroids, wanted

    def apply(self, part: pa.Table, combined: tuple[np.ndarray, np.ndarray], seed: int) -> pa.Array:
        """no_embedding, far_image, or null. Raises ValueError where the widths differ."""
        centroids, wanted = combined
        good = embedded(part, self.reads)
        reasons = np.full(part.num_rows, "no_embedding", object)
        if good.any():
            vectors = unit_vectors(part["image_embed"].filter(pa.array(good)), "image_embed")
            if vectors.shape[1] != centroids.shape[1]:
                raise ValueError(
                    f"image_embed has width {vectors.shape[1]}, {self.inputs['centroids']} has "
                    f"{centroids.shape[1]}: both must be of one proxy"
                )
            found, _ = nearest(vectors, centroids)
            reasons[good] = np.where(wanted[found], None, "far_image")
        return pa.array(reasons, pa.string())
