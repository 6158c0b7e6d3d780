import pytest
import torch
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures
from pipeline.losses.objective import Objective


class Spread(nn.Module):
    """Has a parameter of its own, as a learned bias would be."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(3.0))

    def forward(self, features: PairFeatures) -> Tensor:
        return features.image_embed.sum() + self.bias


class Scale(nn.Module):
    def forward(self, features: PairFeatures) -> Tensor:
        return features.logit_scale


def features() -> PairFeatures:
    rows = torch.ones(2, 5)
    return PairFeatures(
        image_embed=rows,
        text_embed=rows,
        logit_scale=torch.tensor(7.0),
    )


def test_total_is_the_weighted_sum_and_values_are_unweighted() -> None:
    objective = Objective(terms={"spread": Spread(), "scale": Scale()}, weights={"scale": 0.5})
    total, values = objective(features())
    assert total.item() == 13.0 + 0.5 * 7.0
    assert {name: value.item() for name, value in values.items()} == {"spread": 13.0, "scale": 7.0}


def test_parameters_of_terms_are_found() -> None:
    objective = Objective(terms={"spread": Spread()})
    assert [name for name, _ in objective.named_parameters()] == ["terms.spread.bias"]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown terms \['scael'\].*\['scale'\]"):
        Objective(terms={"scale": Scale()}, weights={"scael": 1.0})
    with pytest.raises(ValueError, match="at least one term"):
        Objective(terms={})
    with pytest.raises(ValueError, match="'loss'"):
        Objective(terms={"loss": Scale()})
