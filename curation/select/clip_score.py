"""Selector: keep the pairs whose image and caption agree, by the cosine of their embeddings under a
proxy model.

| who | rule |
|---|---|
| LAION-400M | ViT-B/32 score >= 0.3 |
| LAION-5B | ViT-B/32 >= 0.28 (English), multilingual model >= 0.26 |
| DataComp | L/14: the best 30 %; B/32: >= 0.25 |

Scores of different models are not comparable: a threshold belongs to its proxy, a fraction carries
over.
"""

from typing import Any

import numpy as np
import pyarrow as pa


class ClipScore:
    """Drops low scores ("clip_score"); a null or NaN score is dropped as "missing_score" or "nan".

    Exactly one of
    threshold: keep score >= threshold;
    fraction: keep int(n * fraction) of the n pairs that have a score, the highest; equal scores go
        by ascending uid.
    Price: for a fraction, one score and one uid per pair in memory while combining. A weak proxy
        prefers what it already knows: with a low fraction rare concepts go first.
    """

    name = "clip_score"
    version = 1
    reads = ("clip_score",)

    def __init__(self, *, threshold: float | None = None, fraction: float | None = None):
        if (threshold is None) == (fraction is None):
            raise ValueError(
                f"threshold={threshold} and fraction={fraction}: "
                "set exactly one of them, the other to null"
            )
        if fraction is not None and not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction {fraction} is outside [0, 1]")
        self.threshold = threshold
        self.fraction = fraction

    def measure(self, part: pa.Table) -> tuple[np.ndarray, np.ndarray] | None:
        """(scores, uids) of the pairs that have a score; None when a threshold decides."""
        if self.threshold is not None:
            return None
        scores, uids = _columns(part)
        scored = ~np.isnan(scores)
        return scores[scored], uids[scored]

    def combine(self, measures: list[Any]) -> tuple[float, str]:
        """(score, uid) of the last pair that is kept: those after it in (descending score,
        ascending uid) go.
        """
        if self.threshold is not None:
            return self.threshold, ""
        scores = np.concatenate([scores for scores, _ in measures] or [np.empty(0)])
        uids = np.concatenate([uids for _, uids in measures] or [np.empty(0, str)])
        count = int(len(scores) * self.fraction)
        if count == 0:
            return float("inf"), ""
        last = np.lexsort((uids, -scores))[count - 1]
        return float(scores[last]), str(uids[last])

    def apply(self, part: pa.Table, combined: tuple[float, str], seed: int) -> pa.Array:
        limit, last_uid = combined
        scores, uids = _columns(part)
        kept = scores >= limit
        if self.fraction is not None:
            kept = (scores > limit) | ((scores == limit) & (uids <= last_uid))
        missing = part["clip_score"].is_null().to_numpy()
        reasons = np.where(kept, None, "clip_score").astype(object)
        reasons[np.isnan(scores)] = "nan"
        reasons[missing] = "missing_score"
        return pa.array(reasons, pa.string())


def _columns(part: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(float64 scores with NaN for null, uids)."""
    scores = part["clip_score"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return scores, np.asarray(part["uid"].to_pylist(), dtype=str)
