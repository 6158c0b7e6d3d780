"""Choosing the next token: classifier-free guidance, temperature, nucleus. Pure functions.

Letters: B captions, V vocabulary.
"""

import torch
from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Log-probabilities under classifier-free guidance, u + g (c - u) (arXiv:2307.16686),
    normalised.

    conditional, unconditional: (B, V) logits with and without the image. guidance g: 1 is exactly
    the conditional model, 0 exactly the unconditional one; above 1 the caption tells more of this
    image and less of the language. A token that either side forbids (-inf) stays forbidden.
    Price: two forwards a token, unless g is 0 or 1.
    """
    if guidance == 1:  # also exact: u + (c - u) is not c in floating point
        return conditional.log_softmax(-1)
    if guidance == 0:
        return unconditional.log_softmax(-1)
    c, u = conditional.log_softmax(-1), unconditional.log_softmax(-1)
    forbidden = torch.isneginf(c) | torch.isneginf(u)
    return (u + guidance * (c - u)).masked_fill(forbidden, -torch.inf).log_softmax(-1)


def choose(log_probs: Tensor, *, temperature: float, top_p: float, uniforms: Tensor) -> Tensor:
    """One token for each row, (B,) int64.

    temperature: 0 takes the most likely (the first of equals). top_p: the smallest set of tokens
    that holds this much probability is drawn from; 1 is all. uniforms: (B,) in [0, 1), one draw a
    row; all randomness is in them.
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    probs, order = (log_probs.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill((before >= top_p) & (before > 0), 0.0)
    reached = probs.cumsum(-1)
    target = uniforms.to(probs).unsqueeze(-1) * reached[:, -1:]
    last = (probs > 0).sum(-1, keepdim=True) - 1  # rounding may put the target past the end
    rank = torch.searchsorted(reached, target, right=True).minimum(last)
    return order.gather(-1, rank).squeeze(-1)


def check_sampling(*, temperature: float, top_p: float, guidance: float) -> None:
    """Raises ValueError for values outside their range, naming the knob."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature}: 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: a probability in (0, 1]")
    if guidance < 0:
        raise ValueError(f"guidance {guidance}: 0 (without the image), 1 (plain) or more")
