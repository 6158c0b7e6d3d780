"""Parity cases of training: losses and token masks."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from case import Case, difference, unequal

from pipeline.losses.features import PairFeatures
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.tokens.random import RandomTokens


def losses(content: dict, arrays: dict) -> Iterator[Case]:
    measures = {"clip_infonce": _softmax_loss}
    for loss, cases in content.items():
        for name, case in cases.items():
            key = f"{loss}/{name}"
            own = {
                k.removeprefix(f"{key}/"): v for k, v in arrays.items() if k.startswith(f"{key}/")
            }
            measure = partial(measures[loss], case, own) if loss in measures else None
            yield Case(key, measure, 1e-9)


def _softmax_loss(case: dict, arrays: dict) -> float:
    image, text = (torch.tensor(arrays[f"in/{n}"], requires_grad=True) for n in ("image", "text"))
    log_scale = torch.tensor(case["scalars"]["log_scale"], dtype=torch.float64, requires_grad=True)
    features = PairFeatures(
        image_embed=image,
        text_embed=text,
        logit_scale=log_scale.exp(),
    )
    loss = SoftmaxLoss()(features)
    loss.backward()
    # a bias on all logits changes neither loss nor gradients: we have none, so its gradient is 0
    gradients = {"log_scale": log_scale.grad.item(), "bias": 0.0}
    return max(
        difference(loss.item(), case["loss"]),
        difference(image.grad.numpy(), arrays["grad/image"]),
        difference(text.grad.numpy(), arrays["grad/text"]),
        *(difference(gradients[name], value) for name, value in case["grad_scalars"].items()),
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
