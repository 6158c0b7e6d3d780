"""How near two embeddings are: the metric of a model's space, which its losses, its evaluation and
its feature files all use.

A metric is stateless: a learned curvature is the model's parameter and comes in as a number.
Letters: B rows, N queries, M candidates, D embedding width. Similarities: larger is nearer.
"""

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Metric(Protocol):
    """name: in feature files.  curved: whether the space has a learned curvature, and the model a
    learned scale for each modality.  inner: whether the similarity is the inner product.
    """

    name: str
    curved: bool
    inner: bool

    def place(self, projected: Tensor) -> Tensor:
        """(B, D) projections of a tower -> the embeddings that are compared and kept."""

    def similarity(
        self, queries: Tensor, candidates: Tensor, curvature: Tensor | None = None
    ) -> Tensor:
        """(..., N, D), (..., M, D) -> (..., N, M), in float32 at least."""

    def centre(self, embeds: Tensor) -> Tensor:
        """(..., B, D) -> (..., D): one embedding in the place of several, as of prompts."""


class Cosine:
    """The unit sphere and its inner product (CLIP)."""

    name, curved, inner = "cosine", False, True

    def place(self, projected: Tensor) -> Tensor:
        return unit_norm(projected)

    def similarity(
        self, queries: Tensor, candidates: Tensor, curvature: Tensor | None = None
    ) -> Tensor:
        return queries @ candidates.mT

    def centre(self, embeds: Tensor) -> Tensor:
        return F.normalize(embeds.mean(dim=-2), dim=-1)


class Arc(Cosine):
    """The unit sphere and minus the angle, in radians: EuCLIP's "elliptic"."""

    name, inner = "arc", False

    def similarity(
        self, queries: Tensor, candidates: Tensor, curvature: Tensor | None = None
    ) -> Tensor:
        cosine = (queries.double() @ candidates.double().mT).clamp(-1 + 1e-15, 1 - 1e-15)
        return -_at_least_float32(cosine.acos(), queries)


class Euclidean:
    """All of R^D; projections are divided by sqrt(D) (EuCLIP, arXiv:2409.13079, sec. 3).

    squared: minus the squared distance, the paper's choice, or minus the distance.
    On unit vectors a scale of s is the cosine's at 2 s.
    """

    curved, inner = False, False

    def __init__(self, *, squared: bool = True) -> None:
        self.squared = squared
        self.name = "euclidean_squared" if squared else "euclidean"

    def place(self, projected: Tensor) -> Tensor:
        return _at_least_float32(projected, projected) / projected.shape[-1] ** 0.5

    def similarity(
        self, queries: Tensor, candidates: Tensor, curvature: Tensor | None = None
    ) -> Tensor:
        # In float64: |q|^2 + |c|^2 - 2 q c of neighbours is a small difference of large numbers.
        q, c = queries.double(), candidates.double()
        squared = q.square().sum(-1)[..., :, None] + c.square().sum(-1)[..., None, :]
        squared = (squared - 2 * q @ c.mT).clamp(min=0)
        distance = squared if self.squared else squared.clamp(min=1e-24).sqrt()
        return -_at_least_float32(distance, queries)

    def centre(self, embeds: Tensor) -> Tensor:
        return embeds.mean(dim=-2)

    def cone(
        self, apex: Tensor, other: Tensor, curvature: Tensor | None, radius: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(B,) angles at each apex between its axis and the other, and half apertures, radians."""
        x, away = apex.double(), (other - apex).double()
        length = x.norm(dim=-1)
        cosine = (away * x).sum(-1) / (away.norm(dim=-1) * length + eps)
        return _within(cosine, eps).acos(), _within(radius / (length + eps), eps).asin()


class Lorentz:
    """Hyperbolic space (MERU, arXiv:2304.09172, sec. 3): an embedding is a vector u of the tangent
    space at the origin, lifted to the hyperboloid where it is compared.

    kind: minus the "distance" (MERU), the Lorentzian "inner" product, or minus the distance
        "squared" (EuCLIP's variants).
    init_curvature: of the learned -c, which stays in [0.1, 10].
    In float64. Feature files hold u; its norm is how far from the root an item is.
    """

    curved, inner = True, False
    bounds = (0.1, 10.0)  # MERU, app. A

    def __init__(
        self,
        *,
        kind: Literal["distance", "inner", "squared"] = "distance",
        init_curvature: float = 1.0,
    ) -> None:
        if kind not in ("distance", "inner", "squared"):
            raise ValueError(f"model.metric.kind={kind}: distance, inner or squared")
        low, high = self.bounds
        if not low <= init_curvature <= high:
            raise ValueError(f"model.metric.init_curvature={init_curvature}: in [{low}, {high}]")
        self.kind, self.init_curvature = kind, init_curvature
        self.name = f"lorentz_{kind}"

    def place(self, projected: Tensor) -> Tensor:
        return _at_least_float32(projected, projected)

    def similarity(
        self, queries: Tensor, candidates: Tensor, curvature: Tensor | None = None
    ) -> Tensor:
        (x, x_time), (y, y_time) = (self.lift(u, curvature) for u in (queries, candidates))
        product = x @ y.mT - x_time[..., :, None] * y_time[..., None, :]
        if self.kind != "inner":
            c = curvature.double()
            product = -(-c * product).clamp(min=1 + 1e-8).acosh()
            product = product / c.sqrt() if self.kind == "distance" else -product.square() / c
        return _at_least_float32(product, queries)

    def centre(self, embeds: Tensor) -> Tensor:
        """In the tangent space, as MERU averages prompts."""
        return embeds.mean(dim=-2)

    def lift(self, embed: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Space (..., D) and time (...,) parts on the hyperboloid <x, x> = -1 / c, float64."""
        u, c = embed.double(), curvature.double()
        # Beyond the clamp, MERU's, sinh leaves what float64 squares without loss.
        radius = (c * u.square().sum(-1, keepdim=True).clamp(min=1e-24)).sqrt()
        x = radius.clamp(max=math.asinh(2**15)).sinh() / radius * u
        return x, (1 / c + x.square().sum(-1)).sqrt()

    def cone(
        self, apex: Tensor, other: Tensor, curvature: Tensor | None, radius: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(B,) exterior angles at each apex, and half apertures, radians (MERU, eq. 5 to 7)."""
        c = curvature.double()
        (x, x_time), (y, y_time) = (self.lift(u, curvature) for u in (apex, other))
        product = c * ((x * y).sum(-1) - x_time * y_time)
        length = x.norm(dim=-1)
        below = length * (product.square() - 1).clamp(min=1e-8).sqrt() + eps
        cosine = (y_time + product * x_time) / below
        sine = 2 * radius / (length * c.sqrt() + eps)
        return _within(cosine, eps).acos(), _within(sine, eps).asin()


def unit_norm(features: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least: bfloat16 keeps three digits of a similarity."""
    return F.normalize(_at_least_float32(features, features), dim=-1)


def _at_least_float32(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.promote_types(like.dtype, torch.float32))


def _within(x: Tensor, eps: float) -> Tensor:
    """Into (-1, 1), where acos and asin have a gradient."""
    edge = 1 - max(eps, 1e-15)
    return x.clamp(-edge, edge)
