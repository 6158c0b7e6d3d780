"""Whether a zero-shot classifier's confidence is its accuracy (Guo et al., arXiv:1706.04599).

Letters: I images, C classes.
"""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pipeline.evals.bootstrap import mean
from pipeline.evals.task import Embedder
from pipeline.evals.zero_shot import ZeroShot

SPAN = math.log(1000)  # temperatures looked at: a thousandth to a thousand times


class Calibration:
    """Confidence of softmax(logit_scale * cosine) on a labelled set.

    data, split, classes, templates: as `ZeroShot`'s.  bins: of equal width over [0, 1].
    One temperature is fitted on every second image and measured on the others; so are the numbers
    before it, or they would be of other images.
    Not for comparing models of different accuracy by nll, nor sets of a few hundred images by ece:
    it is biased upwards by the noise of each bin.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        classes: Sequence[str] | str | None = None,
        templates: str | None = None,
        bins: int = 15,
        batch_size: int = 256,
    ) -> None:
        if bins < 1:
            raise ValueError(f"bins={bins}: at least 1")
        self.zero_shot = ZeroShot(
            data=data, split=split, classes=classes, templates=templates, batch_size=batch_size
        )
        self.bins = bins

    def run(self, trained: Embedder) -> dict[str, float]:
        """`calibration_metrics` of the split."""
        scores, labels = self.zero_shot.scores(trained)
        return calibration_metrics(scores.double() * trained.logit_scale, labels, bins=self.bins)


def calibration_metrics(logits: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """top1, confidence, ece, nll of the odd images; temperature of the even ones, and both with it.

    logits: (I, C) float64, I >= 2.  labels: (I,) int64.
    """
    if len(labels) < 2:
        raise ValueError(f"{len(labels)} image: a temperature needs some to fit and some to ask")
    fitted, asked = slice(0, None, 2), slice(1, None, 2)
    found = temperature(logits[fitted], labels[fitted])
    plain, scaled = logits[asked], logits[asked] / found
    sure, hits = plain.softmax(dim=1).max(dim=1)
    return {
        "top1": mean(hits == labels[asked]),
        "confidence": mean(sure),
        "ece": expected_calibration_error(plain, labels[asked], bins=bins),
        "nll": mean(_nll(plain, labels[asked])),
        "temperature": found,
        "scaled_ece": expected_calibration_error(scaled, labels[asked], bins=bins),
        "scaled_nll": mean(_nll(scaled, labels[asked])),
    }


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| over bins of equal width of the confidence."""
    confidence, found = logits.softmax(dim=1).max(dim=1)
    hits = (found == labels).to(confidence.dtype)
    # (0, 1/bins], ..., (1 - 1/bins, 1]
    number = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    differences = torch.zeros(bins, dtype=confidence.dtype)
    return float(differences.index_add(0, number, hits - confidence).abs().sum() / len(labels))


def temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits are divided by for the least mean NLL; 1 where nothing is lower.

    The NLL is convex in the inverse of the temperature, so it has one minimum.
    """

    def loss(log_inverse: float) -> float:
        return float(_nll(logits * math.exp(log_inverse), labels).mean())

    best = minimize_scalar(loss, bounds=(-SPAN, SPAN), method="bounded", options={"xatol": 1e-6})
    return math.exp(-best.x) if best.fun < loss(0.0) else 1.0


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
