"""The training objective: a weighted sum of loss terms over features that were gathered once."""

from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.losses.features import PairFeatures

LOGGED_BESIDE_TERMS = ("loss", "logit_scale", "logit_bias", "curvature")


class Objective(nn.Module):
    """The weighted sum of terms.

    terms: name -> module called with PairFeatures that returns a scalar; None for a term that a
        phase has dropped.
    weights: name -> factor, 1 where not named.
    Returns the weighted sum and every term's value before weighting. Reduction and gradient
    convention are the terms'. Raises ValueError without terms, for a weight of no term, and for a
    name the log needs itself.
    """

    def __init__(
        self, *, terms: Mapping[str, nn.Module | None], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        unknown = sorted(set(weights) - set(terms))
        if unknown:
            raise ValueError(f"weights for unknown terms {unknown}: the terms are {sorted(terms)}")
        terms = {name: term for name, term in terms.items() if term is not None}
        if not terms:
            raise ValueError("an objective needs at least one term: terms={name: term}")
        reserved = sorted(set(terms) & set(LOGGED_BESIDE_TERMS))
        if reserved:
            raise ValueError(f"term names {reserved} are logged already: rename the terms")
        self.terms = nn.ModuleDict(terms)
        self.weights = {name: float(weights.get(name, 1.0)) for name in terms}

    def forward(self, features: PairFeatures) -> tuple[Tensor, dict[str, Tensor]]:
        values = {name: term(features) for name, term in self.terms.items()}
        return sum(self.weights[name] * value for name, value in values.items()), values
