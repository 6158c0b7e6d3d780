"""Selector: keep the pairs whose image and caption agree, by the cosine of their embeddings under a
proxy model.

| who | rule |
|---|---|
| LAION-400M | ViT-B/32 score >= 0.3 |
| LAION-5B | ViT-B/32 >= 0.28 (English), multilingual model >= 0.26 |
| DataComp | L/14: the best 30 % (rule: datacomp); B/32: >= 0.25 |

Scores of different models are not comparable: a threshold belongs to its proxy, a fraction carries
over.
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

Rule = Literal["exact", "datacomp"]


class ClipScore:
    """Drops low scores ("clip_score"); a null or NaN score is dropped as "missing_score" or "nan".

    Exactly one of
    threshold: keep score >= threshold, both in the score's own type: a float32 score that was
        written as 0.26 stays at 0.26, though as a float64 it lies a little below;
    fraction: in [0, 1], keep the highest, by
    rule: "exact": int(n * fraction) of the n pairs that have a score; equal scores go by ascending
        uid, so no more and no fewer are kept.
        "datacomp": what DataComp's published subsets were made with. With k = int(N * fraction) of
        all N pairs, scored or not, the threshold is the (k+1)-th highest score, so k + 1 pairs stay
        and all that equal the last. Where N pairs hold no (k+1)-th score (its code fails at
        fraction 1, and keeps nothing where a NaN becomes the threshold) all that have one stay.
    Price: for a fraction, one score and one uid per pair in memory while combining. A weak proxy
        prefers what it already knows: with a low fraction rare concepts go first.
    """

    name = "clip_score"
    version = 2
    reads = ("clip_score",)

    def __init__(
        self,
        *,
        threshold: float | None = None,
        fraction: float | None = None,
        rule: Rule = "exact",
    ):
        if (threshold is None) == (fraction is None):
            raise ValueError(
                f"threshold={threshold} and fraction={fraction}: "
                "set exactly one of them, the other to null"
            )
        if threshold is not None and np.isnan(threshold):
            raise ValueError("threshold is NaN: no score would reach it")
        if fraction is not None and not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction {fraction} is outside [0, 1]")
        if rule not in ("exact", "datacomp"):
            raise ValueError(f"unknown rule {rule!r}: use exact or datacomp")
        self.threshold, self.fraction, self.rule = threshold, fraction, rule

    def measure(self, part: pa.Table) -> tuple[np.ndarray, np.ndarray, int] | None:
        """(scores, uids) of the pairs that have a score, and the number of all; None when a
        threshold decides.
        """
        if self.threshold is not None:
            return None
        scores = _scores(part)
        uids = np.asarray(part["uid"].to_pylist(), dtype=str)
        scored = ~np.isnan(scores)
        return scores[scored], uids[scored], len(scores)

    def combine(self, measures: list[Any]) -> tuple[float, str | None]:
        """(score, uid) of the last pair that is kept: those after it in (descending score,
        ascending uid) go. A null uid: all of that score stay.
        """
        if self.threshold is not None:
            return self.threshold, None
        scores = np.concatenate([scores for scores, _, _ in measures] or [np.empty(0)])
        if self.rule == "datacomp":
            place = int(sum(total for _, _, total in measures) * self.fraction)
            if place >= len(scores):
                return -np.inf, None
            return float(-np.partition(-scores, place)[place]), None
        uids = np.concatenate([uids for _, uids, _ in measures] or [np.empty(0, str)])
        count = int(len(scores) * self.fraction)
        if count == 0:
            return np.inf, ""
        last = np.lexsort((uids, -scores))[count - 1]
        return float(scores[last]), str(uids[last])

    def apply(self, part: pa.Table, combined: tuple[float, str | None], seed: int) -> pa.Array:
        """clip_score, nan, missing_score, or null."""
        limit, last_uid = combined
        scores = _scores(part)
        if self.threshold is not None:
            kind = np.dtype(part["clip_score"].type.to_pandas_dtype())
            limit = float(kind.type(limit)) if kind.kind == "f" else limit
        kept = scores >= limit
        if last_uid is not None:
            uids = np.asarray(part["uid"].to_pylist(), dtype=str)
            kept = (scores > limit) | ((scores == limit) & (uids <= last_uid))
        missing = part["clip_score"].is_null().to_numpy()
        reasons = np.where(kept, None, "clip_score").astype(object)
        reasons[np.isnan(scores)] = "nan"
        reasons[missing] = "missing_score"
        return pa.array(reasons, pa.string())


def _scores(part: pa.Table) -> np.ndarray:
    """float64, NaN for null."""
    return part["clip_score"].cast(pa.float64()).to_numpy(zero_copy_only=False)
