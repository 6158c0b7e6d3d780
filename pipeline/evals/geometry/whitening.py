"""How likely a feature is, under the Gaussian of a calibration set (Whitened CLIP,
arXiv:2505.06934).

Letters: N rows, D width. Rows are features before their norm is made 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """y = (x - mean) @ matrix has identity covariance over the rows it was made of.

    mean: (D,).  matrix: (D, D) = V L^-1/2 of the covariance V L V^T (n - 1).  shrinkage: the share
    of the mean variance that was mixed in, 0 where the covariance has full rank.
    """

    mean: Tensor
    matrix: Tensor
    shrinkage: float

    @classmethod
    def of(cls, features: Tensor, *, shrinkage: float | None = None) -> "Whitening":
        """features: (N, D), N >= 2. shrinkage: in [0, 1]; None for 0 where the covariance has an
        inverse, else 0.1: fewer rows than dimensions, or a model that has hardly been trained, have
        directions without any variance. Raises ValueError where there is no inverse.
        """
        rows, width = features.shape
        if rows < 2:
            raise ValueError(f"{rows} rows have no covariance: need 2, better 10 times {width}")
        x = features.double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / (rows - 1)
        target = covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        for share in (0.0, 0.1) if shrinkage is None else (shrinkage,):
            values, vectors = torch.linalg.eigh((1 - share) * covariance + share * target)
            if float(values[0]) > float(values[-1]) * 1e-12:
                return cls(mean, vectors * values.rsqrt(), share)
        raise ValueError(
            f"the covariance of {rows} rows of width {width} has no inverse: give more rows, or a "
            "shrinkage above 0"
        )

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) float64 whitened."""
        return (features.double() - self.mean) @ self.matrix

    def inverse(self, whitened: Tensor) -> Tensor:
        """The features of whitened rows."""
        return self.mean + torch.linalg.solve(self.matrix.T, whitened.double().T).T

    def log_likelihood(self, features: Tensor) -> Tensor:
        """(N,) float64: -(D log 2 pi + |y|^2) / 2, the density of y and not of x."""
        squared = self(features).square().sum(1)
        return -0.5 * (features.shape[1] * math.log(2 * math.pi) + squared)
