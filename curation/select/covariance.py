"""Selector: the subset that keeps the cross-covariance of images and captions (ClipCov,
arXiv:2403.12267).

Letters: K latent classes, n_k pairs of class k, N = sum n_k, D embedding width; in S_k a row is an
image and a column a text.

score_i = raw_i + 2 S_ii + label_i / 2 - centre_i : central in its own class, well aligned, true to
the class label, far from the other classes. Every pick lowers the scores of its class, so the next
one covers something else.
The authors take 5 to 10 % of CC3M and CC12M: 2.7 and 1.4 times the ImageNet accuracy of the next
best selection.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curation.select.covariance_embedded import select_embedded
from curation.select.covariance_greedy import LatentClass, Variant, merged
from curation.select.covariance_pairs import GivenPairs
from curation.select.latent_classes import class_means, spherical_kmeans
from curation.select.unit_vectors import (
    embedded,
    gathered,
    nearest,
    read_labels,
    unit_vectors,
)
from curation.step import uniform


def select(
    *,
    similarity: Sequence[np.ndarray],
    raw: Sequence[np.ndarray] | np.ndarray,
    label_similarity: Sequence[np.ndarray] | np.ndarray,
    centre_terms: Sequence[np.ndarray] | np.ndarray,
    fraction: float,
    variant: Variant,
) -> np.ndarray:
    """Ids of int(N * fraction) pairs in the order of selection, int64. Sums are float64; ties go to
    the smallest id.

    similarity: S_k of each class, (n_k, n_k), not thresholded, of any float dtype; not copied.
    raw, label_similarity, centre_terms: one value per pair, either a list of K arrays (n_k,) or one
        array (N,) of the classes one after the other.
        raw: sum_j (S+_ij + S+_ji) / n_k with S+ = max(S, 0).
        label_similarity: with the own class's label.
        centre_terms: image to text centre plus text to image centre ("itc + tic").
    Ids count through the classes in the order given: pair i of class k is n_0 + ... + n_(k-1) + i.
        Back to pool rows: np.concatenate(members)[ids], members[k] being the rows of class k.
    variant, for the picks New of a class since its last update and All of them:
        "notebook" (the authors' code): at pick 199, 399, ... of the class, every score of it falls
        by
            sum_New (S+_ij + S+_ji) / n_k + sum_All raw_j / n_k + sum_New label_j / 2 n_k. Earlier
            picks are deducted again with All, and below 199 picks a class is a plain top-k.
        "paper": after every pick, and each pick once: New in all three terms.
    Raises ValueError for shapes that do not fit, numbers that are not finite, a fraction outside
        [0, 1], an unknown variant.
    Price: O(n_k) per pick; a few numbers per pair in memory besides what is given.
    """
    _check(fraction, variant)
    sizes = _sizes(similarity)
    terms = {
        "raw": _per_class("raw", raw, sizes),
        "label_similarity": _per_class("label_similarity", label_similarity, sizes),
        "centre_terms": _per_class("centre_terms", centre_terms, sizes),
    }
    classes, identities, start = [], [], 0
    for k, size in enumerate(sizes):
        if size:
            pairs = GivenPairs(similarity[k])
            raws, labels, centres = (values[k] for values in terms.values())
            # the diagonal is not thresholded: a mismatched pair is punished
            static = raws + 2.0 * pairs.diagonal() + labels / 2.0 - centres
            if not np.isfinite(static).all():
                raise ValueError(
                    f"class {k} has scores that are not finite: drop pairs without embeddings first"
                )
            classes.append(
                LatentClass(pairs, raw=raws, label=labels, static=static, variant=variant)
            )
            identities.append(np.arange(start, start + size))
        start += size
    return merged(
        classes, identities, int(sum(sizes) * fraction), lambda k: classes[k].extend(count=1)
    )


def _check(fraction: float, variant: str) -> None:
    if variant not in ("paper", "notebook"):
        raise ValueError(f"unknown variant {variant!r}: use paper or notebook")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction {fraction} is outside [0, 1]")


def _sizes(similarity: Sequence[np.ndarray]) -> list[int]:
    for k, matrix in enumerate(similarity):
        if np.ndim(matrix) != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"similarity of class {k} has shape {np.shape(matrix)}: "
                "need one square matrix per class"
            )
    return [len(matrix) for matrix in similarity]


def _per_class(name: str, values: Any, sizes: list[int]) -> list[np.ndarray]:
    flat = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype != object
    if flat or (len(values) == sum(sizes) and all(np.ndim(value) == 0 for value in values)):
        if len(values) != sum(sizes):
            raise ValueError(f"{name} has {len(values)} values for {sum(sizes)} pairs")
        return np.split(np.asarray(values, np.float64), np.cumsum(sizes)[:-1])
    parts = [np.asarray(part, np.float64) for part in values]
    if [part.shape for part in parts] != [(size,) for size in sizes]:
        raise ValueError(
            f"{name} has shapes {[part.shape for part in parts][:5]}: need one array per class "
            f"with the lengths {sizes[:5]}, or one array of {sum(sizes)}"
        )
    return parts


class Covariance:
    """Keeps the `fraction` of pairs that ClipCov selects; reasons "covariance", "missing_embed" (an
    embedding is null, not finite or zero), "missing_class" (null in class_column).

    Columns image_embed and text_embed hold vectors of a proxy CLIP; they are brought to unit norm.
    fraction: of the pairs that have embeddings and a class.  variant: see `select`.
    Latent classes come from exactly one of
    num_classes: clusters of the caption embeddings (spherical k-means); a class's label is its
        centroid;
    labels: a file of K class-name embeddings of the same proxy (.npy (K, D), or .parquet with
        text_embed): an image belongs to the class of the nearest name (zero-shot, as ClipCov does
        with 1,000 names);
    class_column: a column that names the class; its label is the mean of its captions' embeddings.
    label_similarity is the caption's cosine to the label of its class.
    iterations, cluster_seed: of k-means; the start is drawn by (cluster_seed, uid), so order and
        sharding do not matter.
    threshold: similarities up to it count as 0, the authors' 0; null: see `select_embedded`.
    memory_gib: for similarities. The embeddings, 16 * N * D bytes, and some 100 bytes a pair come
        on top.
    The centre terms are <image, mean text outside the class> + <text, mean image outside it>: our
        reading, as the authors publish no code for them.
    Price: docs/curation/covariance.md.
    """

    name = "covariance"
    version = 2

    def __init__(
        self,
        *,
        fraction: float,
        variant: Variant = "paper",
        num_classes: int | None = 20,
        labels: str | None = None,
        class_column: str | None = None,
        iterations: int = 20,
        cluster_seed: int = 0,
        threshold: float | None = 0.0,
        memory_gib: float = 2.0,
    ):
        _check(fraction, variant)
        chosen = [value for value in (num_classes, labels, class_column) if value is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"num_classes={num_classes}, labels={labels}, class_column={class_column}: "
                "set exactly one of them, the others to null"
            )
        if (num_classes is not None and num_classes < 1) or iterations < 1:
            raise ValueError(f"num_classes {num_classes}, iterations {iterations}: need at least 1")
        if threshold is not None and not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold {threshold} is outside [0, 1): null turns it off")
        if not memory_gib > 0:
            raise ValueError(f"memory_gib {memory_gib}: need more than 0, such as 2")
        self.fraction, self.variant = fraction, variant
        self.num_classes, self.labels, self.class_column = num_classes, labels, class_column
        self.iterations, self.cluster_seed = iterations, cluster_seed
        self.threshold, self.memory_gib = threshold, memory_gib
        self.reads = ("image_embed", "text_embed", *([class_column] if class_column else []))
        self.inputs = {"labels": labels} if labels else {}

    def measure(self, part: pa.Table) -> dict[str, Any]:
        """uid, class and the embeddings, float32, of the pairs that have all of them."""
        complete = part.filter(pa.array(np.equal(self._missing(part), None)))
        measured: dict[str, Any] = {"uid": np.asarray(complete["uid"].to_pylist(), dtype=str)}
        for name in ("image_embed", "text_embed"):
            measured[name] = unit_vectors(complete[name], name)
        if self.class_column:
            measured["class"] = np.asarray(complete[self.class_column].to_pylist())
        return measured

    def combine(self, measures: list[dict[str, Any]]) -> frozenset[str]:
        """The uids that are kept."""
        measures = [measure for measure in measures if len(measure["uid"])]
        if not measures:
            return frozenset()
        uid = np.concatenate([measure["uid"] for measure in measures])
        by_uid = np.argsort(uid, kind="stable")
        uid = uid[by_uid]
        places = np.empty(len(uid), np.int64)
        places[by_uid] = np.arange(len(uid))
        image, text = (
            gathered([measure[name] for measure in measures], places, name)
            for name in ("image_embed", "text_embed")
        )
        if image.shape != text.shape:
            raise ValueError(
                f"image_embed is {image.shape[1]} wide and text_embed {text.shape[1]}: "
                "need two towers of one proxy"
            )
        given = None
        if self.class_column:
            given = np.concatenate([measure["class"] for measure in measures])[by_uid]
        members, labels = self._classes(uid, image, text, given)
        kept = select_embedded(
            image=image,
            text=text,
            members=members,
            labels=labels,
            fraction=self.fraction,
            variant=self.variant,
            threshold=self.threshold,
            room=int(self.memory_gib * 2**30),
        )
        return frozenset(uid[kept].tolist())

    def _classes(
        self, uid: np.ndarray, image: np.ndarray, text: np.ndarray, given: np.ndarray | None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """(rows of each class, its label (K, D))."""
        labels = None
        if given is not None:
            _, assignment = np.unique(given, return_inverse=True)
        elif self.labels is not None:
            labels = read_labels(self.labels).astype(np.float64)
            if labels.shape[1] != image.shape[1]:
                raise ValueError(
                    f"labels {self.labels} are {labels.shape[1]} wide, image_embed "
                    f"{image.shape[1]}: embed the names with the proxy of annotate.embed"
                )
            assignment, _ = nearest(image, labels)
        else:
            assignment, labels = spherical_kmeans(
                text,
                num_classes=self.num_classes,
                iterations=self.iterations,
                draws=uniform(self.cluster_seed, self.name, uid.tolist()),
            )
        order = np.argsort(assignment, kind="stable")
        bounds = np.flatnonzero(np.diff(assignment[order])) + 1
        members = np.split(order, bounds)
        if labels is None:
            return members, class_means(text, members)
        return members, labels[[assignment[rows[0]] for rows in members]]

    def _missing(self, part: pa.Table) -> np.ndarray:
        """(rows,) a reason, or None where everything is there."""
        reasons = np.full(part.num_rows, None, object)
        if self.class_column:
            reasons[part[self.class_column].is_null().to_numpy()] = "missing_class"
        reasons[~embedded(part, ("image_embed", "text_embed"))] = "missing_embed"
        return reasons

    def apply(self, part: pa.Table, combined: frozenset[str], seed: int) -> pa.Array:
        """covariance, missing_embed, missing_class, or null."""
        reasons = [
            reason or (None if uid in combined else "covariance")
            for uid, reason in zip(part["uid"].to_pylist(), self._missing(part), strict=True)
        ]
        return pa.array(reasons, pa.string())
