"""Parity cases of training: losses, token masks, schedules."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from case import Case, difference, unequal
from torch import nn

from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss
from pipeline.optim.schedules import WarmupCosine
from pipeline.tokens.random import RandomTokens


def losses(content: dict, arrays: dict) -> Iterator[Case]:
    measures = {
        "clip_infonce": partial(_contrastive, (SoftmaxLoss(), TiledSoftmaxLoss(tile=5))),
        "siglip": partial(_contrastive, (SigmoidLoss(), TiledSigmoidLoss(tile=5))),
    }
    for loss, cases in content.items():
        for name, case in cases.items():
            key = f"{loss}/{name}"
            own = {
                k.removeprefix(f"{key}/"): v for k, v in arrays.items() if k.startswith(f"{key}/")
            }
            measure = partial(measures[loss], case, own) if loss in measures else None
            yield Case(key, measure, 1e-9)


def _contrastive(terms: tuple[nn.Module, ...], case: dict, arrays: dict) -> float:
    """The farther of the dense and the tiled loss."""
    return max(_contrastive_of(term, case, arrays) for term in terms)


def _contrastive_of(term: nn.Module, case: dict, arrays: dict) -> float:
    image, text = (torch.tensor(arrays[f"in/{n}"], requires_grad=True) for n in ("image", "text"))
    # A softmax case without a bias names none; with one, it changes nothing and its gradient is 0.
    log_scale, bias = (
        torch.tensor(case["scalars"].get(n, 0.0), dtype=torch.float64, requires_grad=True)
        for n in ("log_scale", "bias")
    )
    features = PairFeatures(
        image_embed=image,
        text_embed=text,
        logit_scale=log_scale.exp(),
        logit_bias=bias,
    )
    loss = term(features)
    image_grad, text_grad, *scalar_grads = torch.autograd.grad(
        loss, [image, text, log_scale, bias], materialize_grads=True
    )
    gradients = dict(zip(("log_scale", "bias"), scalar_grads, strict=True))
    return max(
        difference(loss.item(), case["loss"]),
        difference(image_grad.numpy(), arrays["grad/image"]),
        difference(text_grad.numpy(), arrays["grad/text"]),
        *(difference(gradients[n].item(), value) for n, value in case["grad_scalars"].items()),
    )


def token_masks(content: dict, arrays: dict) -> Iterator[Case]:
    for family, cases in content.items():
        if family == "flip_random_mask":
            for index, case in enumerate(cases):
                yield Case(f"{family}/{index}", partial(_flip_mask, case))
        elif isinstance(cases, list):
            yield from (Case(f"{family}/{index}", None) for index in range(len(cases)))
        else:
            yield Case(family, None)


def _flip_mask(case: dict) -> float:
    noise = torch.tensor(case["noise"], dtype=torch.float64)
    kept = RandomTokens(keep=1.0 - case["mask_ratio"]).from_noise(noise)
    removed = np.asarray(case["removed_mask"])
    if kept is None:  # nothing is dropped, so tokens stay where they are
        return unequal(removed, np.zeros_like(removed))
    mask = np.ones(noise.shape, removed.dtype)
    np.put_along_axis(mask, kept.numpy(), 0, axis=1)
    return max(unequal(kept.numpy(), case["kept_in_order"]), unequal(mask, removed))


def schedules(content: dict, arrays: dict) -> Iterator[Case]:
    for family, cases in content.items():
        if family != "open_clip":
            yield Case(family, None)
            continue
        for name, case in cases.items():
            known = case["kind"] == "cosine"
            measure = partial(_warmup_cosine, case) if known else None
            yield Case(f"{family}/{name}", measure, 1e-12)


def _warmup_cosine(case: dict) -> float:
    batch = 8  # any: the reference counts steps, we count pairs
    schedule = WarmupCosine(warmup_samples=case["warmup"] * batch)
    total = case["steps"] * batch
    factors = [schedule.factor(step * batch, total, batch) for step in range(len(case["lr"]))]
    expected = np.asarray(case["lr"])
    scale = np.where(expected == 0, 1.0, expected)  # the tolerance is relative
    return difference(case["base_lr"] * np.asarray(factors) / scale, expected / scale)
