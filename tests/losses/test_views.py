"""Losses of several views, against the sums of their papers written out pair by pair."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.byol import ByolLoss
from pipeline.losses.each_view import EachView
from pipeline.losses.features import PairFeatures
from pipeline.losses.simclr import SimCLRLoss
from pipeline.losses.softmax import SoftmaxLoss

PAIRS, WIDTH = 5, 4


def features(seed: int = 0, **changes: Tensor) -> PairFeatures:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    extra = {
        "other_views": F.normalize(draw(PAIRS, 1, WIDTH), dim=-1),
        "ssl_embed": draw(PAIRS, 2, WIDTH),
        "predicted": draw(PAIRS, 2, WIDTH),
        "target": draw(PAIRS, WIDTH),
    }
    return PairFeatures(
        image_embed=F.normalize(draw(PAIRS, WIDTH), dim=-1),
        text_embed=F.normalize(draw(PAIRS, WIDTH), dim=-1),
        logit_scale=torch.tensor(7.0, dtype=torch.float64),
        extra=extra | changes,
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / a.norm() / b.norm()).item()


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_simclr_is_its_equation_one(temperature: float) -> None:
    """-log of exp(sim of a positive pair) over the sum of all k != i, mean over the 2 N views."""
    given = features()
    views = [given.extra["ssl_embed"][n, v] for v in (0, 1) for n in range(PAIRS)]
    total = 0.0
    for i, view in enumerate(views):
        partner = (i + PAIRS) % (2 * PAIRS)
        others = sum(
            math.exp(cosine(view, views[k]) / temperature) for k in range(len(views)) if k != i
        )
        total -= math.log(math.exp(cosine(view, views[partner]) / temperature) / others)
    value = SimCLRLoss(temperature=temperature)(given)
    assert value.item() == pytest.approx(total / (2 * PAIRS), rel=1e-12)


def test_simclr_sees_both_views() -> None:
    """The same view twice is another loss: its own gradient would go nowhere."""
    given = features()
    same = given.extra["ssl_embed"][:, :1].expand(-1, 2, -1)
    assert SimCLRLoss()(features(ssl_embed=same)) < SimCLRLoss()(given) - 0.1
    embed = given.extra["ssl_embed"].clone().requires_grad_()
    SimCLRLoss()(features(ssl_embed=embed)).backward()
    assert embed.grad.isfinite().all() and (embed.grad.abs().amax(dim=(0, 2)) > 1e-3).all()


def test_byol_is_two_minus_two_cosines() -> None:
    given = features()
    predicted, target = given.extra["predicted"], given.extra["target"]
    total = sum(2 - 2 * cosine(predicted[n, v], target[n]) for n in range(PAIRS) for v in (0, 1))
    assert ByolLoss()(given).item() == pytest.approx(total / (2 * PAIRS), rel=1e-12)
    near = target.unsqueeze(1) * torch.tensor([[[3.0], [0.5]]])
    assert ByolLoss()(features(predicted=near)).item() == pytest.approx(0, abs=1e-12)


def test_byol_has_no_gradient_to_the_target() -> None:
    leaf = features().extra["target"].clone().requires_grad_()
    assert not ByolLoss()(features(target=leaf)).requires_grad


def test_each_view_is_half_of_each() -> None:
    given = features()
    term = SoftmaxLoss(label_smoothing=0.1)
    second = PairFeatures(
        image_embed=given.extra["other_views"][:, 0],
        text_embed=given.text_embed,
        logit_scale=given.logit_scale,
    )
    expected = 0.5 * term(given) + 0.5 * term(second)
    torch.testing.assert_close(EachView(term=term)(given), expected, rtol=1e-12, atol=0)


def test_mistakes_are_named() -> None:
    bare = PairFeatures(
        image_embed=torch.eye(2), text_embed=torch.eye(2), logit_scale=torch.tensor(1.0)
    )
    for term, name in (
        (SimCLRLoss(), "ssl_embed"),
        (ByolLoss(), "predicted"),
        (EachView(term=SoftmaxLoss()), "other_views"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*model._target_"):
            term(bare)
    untaught = replace(features(), extra={"predicted": torch.rand(PAIRS, 2, WIDTH)})
    with pytest.raises(ValueError, match="'target'"):
        ByolLoss()(untaught)
    with pytest.raises(ValueError, match="temperature 0"):
        SimCLRLoss(temperature=0)
    with pytest.raises(ValueError, match="3 views"):
        SimCLRLoss()(features(ssl_embed=torch.rand(PAIRS, 3, WIDTH)))
