"""How much a linear classifier finds in the image features (CLIP, sec. 3.2 and app. A.3).

Letters: I images, W width of the image tower.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.evals.bootstrap import mean, mean_of_means
from pipeline.evals.labelled_parquet import labelled
from pipeline.evals.labelled_part import Labelled
from pipeline.evals.task import Embedder, in_shares

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # CLIP: 96 values of 1 / 1e-6 to 1 / 1e6


class LinearProbe:
    """Logistic regression (L-BFGS) on the tower's output before the projection, as CLIP's.

    data: a labelled set with two splits, in either layout of `ZeroShot`.
    strengths: values of scikit-learn's C, the inverse of the L2 penalty; the best on a part of the
        training split is taken, and fitted again on all of it.
    validation_fraction: that part; what falls into it is a function of `seed`.
    Features are standardised by the training split's mean and spread, which is not in the paper: it
    makes one range of C fit any tower.
    """

    def __init__(
        self,
        *,
        data: str,
        train_split: str = "train",
        test_split: str = "test",
        strengths: Sequence[float] = STRENGTHS,
        validation_fraction: float = 0.2,
        max_iterations: int = 1000,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if not strengths or min(strengths) <= 0 or not 0 < validation_fraction < 1:
            raise ValueError(
                f"strengths={list(strengths)}, validation_fraction={validation_fraction}: need "
                "some above 0, and a fraction in (0, 1)"
            )
        self.splits = [labelled(Path(data), split) for split in (train_split, test_split)]
        self.strengths, self.validation_fraction = sorted(strengths), validation_fraction
        self.max_iterations, self.seed, self.batch_size = max_iterations, seed, batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """top1, mean_per_class_recall of the test split; strength: the C that was taken."""
        (train, labels), (test, wanted) = (self._features(trained, split) for split in self.splits)
        centre, spread = train.mean(axis=0), train.std(axis=0)
        train, test = ((part - centre) / np.where(spread > 0, spread, 1) for part in (train, test))
        strength = self._best(train, labels)
        hits = torch.from_numpy(self._fitted(train, labels, strength).predict(test) == wanted)
        return {
            "top1": mean(hits),
            "mean_per_class_recall": mean_of_means(hits, torch.from_numpy(wanted)),
            "strength": strength,
        }

    def _features(self, trained: Embedder, split: Labelled) -> tuple[np.ndarray, np.ndarray]:
        """(I, W) float64 and (I,) labels."""
        features: list[Tensor] = []
        labels: list[int] = []
        for batch in in_shares(split.samples(), self.batch_size):
            images = [image for image, _ in batch]
            features.append(trained.image_features(images, batch_size=self.batch_size))
            labels += [label for _, label in batch]
        if len(set(labels)) < 2:
            raise ValueError(f"{split.directory}: {split.split} has images of {set(labels)} alone")
        return torch.cat(features).double().numpy(), np.array(labels)

    def _best(self, train: np.ndarray, labels: np.ndarray) -> float:
        if len(self.strengths) == 1:
            return self.strengths[0]
        order = np.random.default_rng(self.seed).permutation(len(labels))
        held = max(1, round(self.validation_fraction * len(order)))
        asked, fitted = order[:held], order[held:]
        if len(set(labels[fitted])) < 2:
            raise ValueError(
                f"{len(fitted)} images of one class are left to fit: lower validation_fraction="
                f"{self.validation_fraction}, or give one of strengths"
            )
        scores = [
            self._fitted(train[fitted], labels[fitted], strength).score(train[asked], labels[asked])
            for strength in self.strengths
        ]
        return self.strengths[int(np.argmax(scores))]  # of equal ones the smallest: simplest

    def _fitted(self, train: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
        found = LogisticRegression(C=strength, max_iter=self.max_iterations)
        with warnings.catch_warnings():
            # the paper stops after 1,000 iterations too
            warnings.simplefilter("ignore", ConvergenceWarning)
            return found.fit(train, labels)
