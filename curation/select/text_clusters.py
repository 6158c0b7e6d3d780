"""Selector: clusters of images and how many of each hold text ("Parrot Captions Teach CLIP to Spot
Text", arXiv:2312.14232). It scores; it drops only what a preset asks it to.

The paper clusters OpenAI ViT-B/32 image features of LAION (PCA to 256 numbers, k-means, 4,000
clusters) to see where the text is, and removes duplicates within clusters. Here k-means is by
cosine and without PCA.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from curation.select.latent_classes import spherical_kmeans
from curation.select.unit_vectors import embedded, gathered, nearest, unit_vectors
from curation.step import uniform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clusters:
    """centroids (K, D) of unit norm; size (K,) images; text_rate (K,) of those that were read, the
    share with text, NaN where none was.
    """

    centroids: np.ndarray
    size: np.ndarray
    text_rate: np.ndarray


class TextClusters:
    """Scores every pair with its image's cluster and that cluster's text rate; drops nothing by
    default.

    Scores: text_cluster (a number for selectors behind this one) and text_cluster_rate, the share
    of the cluster's images with text; null without an embedding.
    max_text_rate: drops every image ("text_cluster") of a cluster with a higher rate, those without
        text too; null drops nothing. Pairs without an embedding stay.
    num_clusters: the paper's is 4,000 for 400 M images.
    min_text_area_fraction: an image holds text when more of it is covered.
    fit_fraction: of the pairs, drawn by (cluster_seed, uid), that the clusters and their rates are
        made of; what that saves is memory.
    iterations, cluster_seed: of k-means; order and sharding do not matter.
    Price: 4 D bytes a fitted pair (2 KB at 512), and N K D multiplications twice.
    """

    name = "text_clusters"
    version = 1
    reads = ("image_embed", "text_area_fraction")
    columns: ClassVar[dict[str, pa.DataType]] = {
        "text_cluster": pa.int32(),
        "text_cluster_rate": pa.float64(),
    }

    def __init__(
        self,
        *,
        max_text_rate: float | None = None,
        num_clusters: int = 100,
        min_text_area_fraction: float = 0.0,
        fit_fraction: float = 1.0,
        iterations: int = 20,
        cluster_seed: int = 0,
    ):
        if max_text_rate is not None and not 0.0 <= max_text_rate <= 1.0:
            raise ValueError(f"max_text_rate {max_text_rate} is outside [0, 1]")
        if num_clusters < 1 or iterations < 1:
            raise ValueError(
                f"num_clusters {num_clusters}, iterations {iterations}: need at least 1"
            )
        if not 0.0 <= min_text_area_fraction < 1.0:
            raise ValueError(f"min_text_area_fraction {min_text_area_fraction} is outside [0, 1)")
        if not 0.0 < fit_fraction <= 1.0:
            raise ValueError(f"fit_fraction {fit_fraction} is outside (0, 1]")
        self.max_text_rate = max_text_rate
        self.num_clusters = num_clusters
        self.min_text_area_fraction = min_text_area_fraction
        self.fit_fraction = fit_fraction
        self.iterations = iterations
        self.cluster_seed = cluster_seed

    def measure(self, part: pa.Table) -> dict[str, np.ndarray]:
        """uid, draw, image (n, D) float32 and area (NaN: not read) of the pairs to fit."""
        draws = uniform(self.cluster_seed, self.name, part["uid"].to_pylist())
        fitted = embedded(part, ["image_embed"]) & (draws < self.fit_fraction)
        rows = part.filter(pa.array(fitted))
        area = rows["text_area_fraction"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        return {
            "uid": np.asarray(rows["uid"].to_pylist(), dtype=str),
            "draw": draws[fitted],
            "image": unit_vectors(rows["image_embed"], "image_embed"),
            "area": area,
        }

    def combine(self, measures: list[dict[str, np.ndarray]]) -> Clusters | None:
        """The clusters; None when no pair has an embedding."""
        measures = [measure for measure in measures if len(measure["uid"])]
        if not measures:
            log.warning("text_clusters: no pair to fit has an image_embed")
            return None
        uid, draw, area = (
            np.concatenate([measure[name] for measure in measures])
            for name in ("uid", "draw", "area")
        )
        by_uid = np.argsort(uid, kind="stable")
        places = np.empty_like(by_uid)
        places[by_uid] = np.arange(len(by_uid))
        image = gathered([measure["image"] for measure in measures], places, "image_embed")
        assignment, centroids = spherical_kmeans(
            image, num_classes=self.num_clusters, iterations=self.iterations, draws=draw[by_uid]
        )
        clusters = self._rated(assignment, centroids, area[by_uid])
        _report(clusters)
        return clusters

    def _rated(self, assignment: np.ndarray, centroids: np.ndarray, area: np.ndarray) -> Clusters:
        count = len(centroids)
        read = np.bincount(assignment, weights=~np.isnan(area), minlength=count)
        text = area > self.min_text_area_fraction  # NaN is not
        with_text = np.bincount(assignment, weights=text, minlength=count)
        rate = np.divide(with_text, read, out=np.full(count, np.nan), where=read > 0)
        return Clusters(centroids, np.bincount(assignment, minlength=count), rate)

    def apply(self, part: pa.Table, combined: Clusters | None, seed: int) -> pa.Array:
        reasons = np.full(part.num_rows, None, object)
        if combined is not None and self.max_text_rate is not None:
            cluster = _clusters_of(part, combined)
            over = combined.text_rate > self.max_text_rate  # NaN is not
            reasons[(cluster >= 0) & over[cluster]] = "text_cluster"
        return pa.array(reasons, pa.string())

    def score(self, part: pa.Table, combined: Clusters | None, seed: int) -> dict[str, pa.Array]:
        cluster, rate = np.full(part.num_rows, -1), np.full(part.num_rows, np.nan)
        if combined is not None:
            cluster = _clusters_of(part, combined)
            rate = np.where(cluster >= 0, combined.text_rate[cluster], np.nan)
        return {
            "text_cluster": pa.array(cluster, pa.int32(), mask=cluster < 0),
            "text_cluster_rate": pa.array(rate, pa.float64(), mask=np.isnan(rate)),
        }


def _clusters_of(part: pa.Table, clusters: Clusters) -> np.ndarray:
    """(rows,) cluster of each image; -1 without an embedding."""
    good = embedded(part, ["image_embed"])
    found = np.full(part.num_rows, -1)
    vectors = unit_vectors(part.filter(pa.array(good))["image_embed"], "image_embed")
    if len(vectors):
        found[good] = nearest(vectors, clusters.centroids)[0]
    return found


def _report(clusters: Clusters) -> None:
    rates = clusters.text_rate[~np.isnan(clusters.text_rate)]
    if not len(rates):
        log.warning("text_clusters: no image with an embedding was read by the engine")
        return
    low, middle, high = np.quantile(rates, (0.1, 0.5, 0.9))
    log.info(
        "text_clusters: %d clusters; share of images with text: 10 %% of clusters below %.3f, "
        "median %.3f, 10 %% above %.3f, highest %.3f",
        len(clusters.centroids),
        low,
        middle,
        high,
        rates.max(),
    )
