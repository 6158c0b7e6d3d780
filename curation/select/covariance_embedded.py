"""Covariance selection from embeddings, in bounded memory (see `curation.select.covariance`).

Classes are worked off one after the other: only the one at work has its similarities in memory.
Letters: K latent classes, n_k pairs of class k, N pairs, D embedding width.
"""

from collections.abc import Sequence

import numpy as np

from curation.select.covariance_greedy import LatentClass, Variant, merged
from curation.select.covariance_pairs import EmbeddedPairs, Rows, UnthresholdedPairs
from curation.select.unit_vectors import on_grid


def select_embedded(
    *,
    image: np.ndarray,
    text: np.ndarray,
    members: Sequence[np.ndarray],
    labels: np.ndarray,
    fraction: float,
    variant: Variant,
    threshold: float | None,
    room: int,
) -> np.ndarray:
    """Rows of int(N * fraction) pairs in the order of selection, int64; ties go to the first row.

    image, text: (N, D) float32, unit norm, on the grid of `unit_vectors`.  members: ascending rows
        of each class, every row in one class.  labels: (K, D), on the grid.
    threshold: similarities up to it count as 0; null: all count as they are, and no similarity of
        two pairs is computed, which takes O(N D) for raw and O(n_k D) a pick (ClipCov: 0).
    room: bytes for similarities. A class whose 4 n_k^2 bytes fit is held while its picks are
        found, one class at a time; a larger one is never held, its similarities come from the
        embeddings, block by block, where needed. The answer is the same, bit for bit.
    Price: sum n_k^2 D, twice or thrice for classes that give far more than their share.
    """
    image_sum, text_sum = (side.sum(axis=0, dtype=np.float64) for side in (image, text))
    classes, identities = [], []
    for rows, label in zip(members, labels, strict=True):
        if not len(rows):
            continue
        own_image, own_text = Rows(image, rows), Rows(text, rows)
        pairs = (
            UnthresholdedPairs(own_image, own_text, room=room)
            if threshold is None
            else EmbeddedPairs(own_image, own_text, threshold=threshold, room=room)
        )
        outside = max(1, len(image) - len(rows))
        other_text, other_image = (
            on_grid((everything - own.sum()) / outside)
            for everything, own in ((text_sum, own_text), (image_sum, own_image))
        )
        centre = own_image.inner(other_text) + own_text.inner(other_image)
        label_similarity = own_text.inner(label)
        _hold(pairs)
        raw = pairs.row_sums() / len(rows)
        static = raw + 2.0 * pairs.diagonal() + label_similarity / 2.0 - centre
        latent_class = LatentClass(
            pairs, raw=raw, label=label_similarity, static=static, variant=variant
        )
        # a class's fair share and a quarter, while its similarities are there
        latent_class.extend(int(1.25 * fraction * len(rows)) + 1)
        pairs.release()
        classes.append(latent_class)
        identities.append(rows)
    return merged(classes, identities, int(len(image) * fraction), lambda k: _continue(classes[k]))


def _continue(latent_class: LatentClass) -> None:
    """Half as many picks again: few repetitions, little too much."""
    latent_class.settle()
    _hold(latent_class.pairs)
    latent_class.extend(max(1, len(latent_class.picks) // 2))
    latent_class.pairs.release()


def _hold(pairs: EmbeddedPairs | UnthresholdedPairs) -> None:
    if pairs.fits:
        pairs.hold()
