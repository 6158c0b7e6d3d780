"""Guidance by formula on a model of three tokens, exact identities, and the law of the draws."""

import math

import pytest
import torch

from pipeline.models.decoding import check_sampling, choose, guided

CONDITIONAL = torch.tensor([[0.2, 0.5, 0.3]]).log()
UNCONDITIONAL = torch.tensor([[0.6, 0.3, 0.1]]).log()


@pytest.mark.parametrize("g", [0.5, 1.5, 2.0, 3.0])
def test_three_tokens_by_formula(g):
    weights = [
        math.exp(math.log(u) + g * (math.log(c) - math.log(u)))
        for c, u in ((0.2, 0.6), (0.5, 0.3), (0.3, 0.1))
    ]
    expected = torch.tensor([[math.log(w / sum(weights)) for w in weights]])
    torch.testing.assert_close(guided(CONDITIONAL, UNCONDITIONAL, g), expected)


def test_guidance_changes_the_choice():
    """The image triples token 2 (0.1 -> 0.3): 0.1 * 3^g passes 0.3 * (5/3)^g at g = 1.87."""
    best = [int(guided(CONDITIONAL, UNCONDITIONAL, g).argmax()) for g in (0, 1, 1.8, 1.9)]
    assert best == [0, 1, 1, 2]


def test_identities_are_exact():
    source = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 50, 300, generator=source) * 5
    assert torch.equal(guided(c, u, 1.0), c.log_softmax(-1))
    assert torch.equal(guided(c, u, 0.0), u.log_softmax(-1))
    naive = u.log_softmax(-1) + 1.0 * (c.log_softmax(-1) - u.log_softmax(-1))
    assert not torch.equal(naive, c.log_softmax(-1))  # why 1 is a case of its own


def test_logits_need_no_common_normaliser():
    shifted = guided(CONDITIONAL + 7, UNCONDITIONAL - 3, 2.0)
    torch.testing.assert_close(shifted, guided(CONDITIONAL, UNCONDITIONAL, 2.0))


def test_forbidden_tokens_stay_forbidden():
    c, u = CONDITIONAL.clone(), UNCONDITIONAL.clone()
    c[0, 0], u[0, 1] = -torch.inf, -torch.inf
    found = guided(c, u, 2.0)
    assert found.isneginf().tolist() == [[True, True, False]]
    assert float(found[0, 2]) == 0.0


def reference(probs: list[float], temperature: float, top_p: float, uniform: float) -> int:
    weights = [p ** (1 / temperature) for p in probs]
    weights = [w / sum(weights) for w in weights]
    order = sorted(range(len(weights)), key=lambda n: -weights[n])
    kept, held = [], 0.0
    for n in order:
        if held >= top_p and kept:
            break
        kept.append(n)
        held += weights[n]
    target = uniform * sum(weights[n] for n in kept)
    for n in kept:
        target -= weights[n]
        if target < 0:
            return n
    return kept[-1]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.85, 1.0])
def test_choose_is_the_reference(temperature, top_p):
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 7, generator=source, dtype=torch.float64) * 2
    uniforms = torch.rand(200, generator=source, dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    found = choose(log_probs, temperature=temperature, top_p=top_p, uniforms=uniforms)
    expected = [
        reference(row.exp().tolist(), temperature, top_p, float(u))
        for row, u in zip(log_probs, uniforms, strict=True)
    ]
    assert found.tolist() == expected


def test_greedy_takes_the_first_of_equals_and_draws_nothing():
    log_probs = torch.tensor([[0.4, 0.4, 0.2]]).log()
    assert choose(log_probs, temperature=0, top_p=1.0, uniforms=torch.tensor([0.9])).tolist() == [0]


def test_the_last_possible_uniform_stays_inside():
    log_probs = torch.tensor([[1.0, 1e-30, 0.0]]).log()
    top = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(choose(log_probs, temperature=1.0, top_p=1.0, uniforms=top)) in (0, 1)


@pytest.mark.parametrize(
    ("knob", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("guidance", -0.5)]
)
def test_bad_settings_are_named(knob, value):
    good = {"temperature": 1.0, "top_p": 1.0, "guidance": 1.0}
    with pytest.raises(ValueError, match=knob):
        check_sampling(**{**good, knob: value})
