"""Parity cases of training: losses and token masks."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from case import Case, difference, unequal
from torch import Tensor, nn

from pipeline.losses.entailment import EntailmentLoss
from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss
from pipeline.metric import Arc, Cosine, Euclidean, Lorentz
from pipeline.tokens.attentive import AttentiveTokens, mapped, pooled
from pipeline.tokens.random import RandomTokens
from pipeline.tokens.text_block import BlockText
from pipeline.tokens.text_random import RandomText
from pipeline.tokens.text_shuffle import ShuffleText
from pipeline.tokens.text_truncate import TruncateText


def losses(content: dict, arrays: dict) -> Iterator[Case]:
    measures = {
        "clip_infonce": partial(_contrastive, (SoftmaxLoss(), TiledSoftmaxLoss(tile=5))),
        "siglip": partial(_contrastive, (SigmoidLoss(), TiledSigmoidLoss(tile=5))),
        "euclip": _euclip,
        "meru": _meru,
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


METRICS = {
    "clip": Cosine(),
    "elliptic": Arc(),
    "euclidean": Euclidean(squared=False),
    "euclidean-squared": Euclidean(),
    "hyperbolic": Lorentz(kind="distance"),
    "hyperbolic-inner": Lorentz(kind="inner"),
    "hyperbolic-squared": Lorentz(kind="squared"),
}


def _euclip(case: dict, arrays: dict) -> float:
    """Contrastive and entailment terms on what the metric has placed."""
    consts, given = case["consts"], _scalars(case)
    image, text = (torch.tensor(arrays[f"in/{n}"], requires_grad=True) for n in ("image", "text"))
    features = PairFeatures(
        image_embed=image,
        text_embed=text,
        logit_scale=given["log_scale"].exp(),
        metric=METRICS[consts["geometry"]],
        curvature=given["log_curvature"].exp() if "log_curvature" in given else None,
    )
    contrastive = SoftmaxLoss()(features)
    loss, found = contrastive, {"contrastive_loss": contrastive}
    found["logits_per_image"] = features.logits(image, text)
    if consts["entailment_weight"]:
        entailment = EntailmentLoss(min_radius=consts["K"], eps=0.0)(features)
        found["entailment_loss"] = consts["entailment_weight"] * entailment
        loss = loss + found["entailment_loss"]
    return _compared(case, arrays, loss, found, image, text, given)


def _meru(case: dict, arrays: dict) -> float:
    """The same with a factor of each modality, and MERU's guards against a division by zero."""
    consts, given = case["consts"], _scalars(case)
    image, text = (torch.tensor(arrays[f"in/{n}"], requires_grad=True) for n in ("image", "text"))
    metric, curvature = Lorentz(), given["curv"].exp()
    u, v = image * given["visual_alpha"].exp(), text * given["textual_alpha"].exp()
    features = PairFeatures(
        image_embed=u,
        text_embed=v,
        logit_scale=given["logit_scale"].exp(),
        metric=metric,
        curvature=curvature,
    )
    contrastive = SoftmaxLoss()(features)
    term = EntailmentLoss(min_radius=consts["min_radius"], eps=consts["eps"])
    entailment = term(features)
    angle, aperture = metric.cone(v, u, curvature, consts["min_radius"], consts["eps"])
    found = {
        "contrastive": contrastive,
        "entailment": entailment,
        "image_space": metric.lift(u, curvature)[0],
        "text_space": metric.lift(v, curvature)[0],
        "distance": -metric.similarity(u, v, curvature),
        "half_aperture_text": aperture,
        "exterior_angle": angle,
    }
    loss = contrastive + consts["entail_weight"] * entailment
    return _compared(case, arrays, loss, found, image, text, given)


def _scalars(case: dict) -> dict[str, Tensor]:
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in case["scalars"].items()
    }


def _compared(
    case: dict,
    arrays: dict,
    loss: Tensor,
    found: dict[str, Tensor],
    image: Tensor,
    text: Tensor,
    given: dict[str, Tensor],
) -> float:
    """The largest difference of value, gradients, and those outputs that we have."""
    grads = torch.autograd.grad(
        loss, [image, text, *given.values()], retain_graph=True, materialize_grads=True
    )
    by_name = dict(zip(("image", "text", *given), grads, strict=True))
    expected = {
        name: arrays[f"out/{name}"] if value == "array" else value
        for name, value in case["outputs"].items()
        if name in found
    }
    return max(
        difference(loss.item(), case["loss"]),
        *(difference(by_name[n].numpy(), arrays[f"grad/{n}"]) for n in ("image", "text")),
        *(difference(by_name[n].item(), value) for n, value in case["grad_scalars"].items()),
        *(difference(found[n].detach().numpy(), value) for n, value in expected.items()),
    )


def token_masks(content: dict, arrays: dict) -> Iterator[Case]:
    measures = {
        "open_clip_patch_dropout": _patch_dropout,
        "flip_random_mask": _flip_mask,
        "text_reduction": _text_reduction,
    }
    rows = {"aclip_attentive_mask": _attentive_mask, "aclip_crop_mapping": _crop_mapping}
    for family, cases in content.items():
        if family in measures:
            for index, case in enumerate(cases):
                yield Case(f"{family}/{index}", partial(measures[family], case))
        elif family in rows:
            yield Case(family, partial(rows[family], cases), 1e-9)
        else:
            yield Case(family, None)


def _patch_dropout(case: dict) -> float:
    """open_clip keeps the largest noise, we the smallest."""
    noise = -torch.tensor(case["noise"], dtype=torch.float64)
    policy = RandomTokens(keep=1 - case["prob"])
    kept = policy.from_noise(noise)
    if kept is None:  # nothing is dropped, so tokens stay where they are
        return unequal(np.arange(noise.shape[1]), case["kept_set"][0])
    kept = kept.numpy()
    return max(
        unequal(kept, case["kept_in_order"]),
        unequal(np.sort(kept, axis=1), case["kept_set"]),
        unequal(policy.num_kept(case["num_patches"]), case["num_kept"]),
    )


def _flip_mask(case: dict) -> float:
    noise = torch.tensor(case["noise"], dtype=torch.float64)
    kept = RandomTokens(keep=1.0 - case["mask_ratio"]).from_noise(noise)
    removed = np.asarray(case["removed_mask"])
    if kept is None:  # nothing is dropped, so tokens stay where they are
        return unequal(removed, np.zeros_like(removed))
    return max(
        unequal(kept.numpy(), case["kept_in_order"]),
        unequal(_dropped(kept, noise.shape[1]), removed),
    )


def _dropped(kept: torch.Tensor, num_tokens: int) -> np.ndarray:
    """(B, K) kept indices -> (B, N), 1 where a token is dropped."""
    mask = torch.ones(len(kept), num_tokens, dtype=torch.int64)
    return mask.scatter_(1, kept, 0).numpy()


def _attentive_mask(case: dict) -> float:
    attention = torch.tensor(case["attention"], dtype=torch.float64)
    policy = AttentiveTokens(keep=case["ratio"])
    kept = policy.from_attention(attention)
    return max(
        unequal(_dropped(kept, attention.shape[1]), case["masked"]),
        unequal([policy.num_kept(attention.shape[1])] * len(kept), case["num_kept"]),
        difference(pooled(attention, 2), np.reshape(case["pooled_7x7"], (len(kept), -1))),
    )


def _crop_mapping(case: dict) -> float:
    attention = torch.tensor(case["attention"], dtype=torch.float64)
    boxes = (torch.tensor(case[name]) for name in ("view_box", "wide_box"))
    found = mapped(attention, *boxes)
    kept = AttentiveTokens(keep=0.5).from_attention(found)
    return max(
        difference(found, np.reshape(case["mapped"], found.shape)),
        unequal(_dropped(kept, found.shape[1]), np.reshape(case["masked"], found.shape)),
    )


def _text_reduction(case: dict) -> float:
    """The draws of the reference, spelled as the noise that makes our policies draw the same."""
    context, captions = case["context_length"], case["tokens"]
    room = context - 2
    length = max([context, *(len(caption) + 2 for caption in captions)])
    tokens = torch.zeros(len(captions), length, dtype=torch.int64)
    order = torch.ones(len(captions), length, dtype=torch.float64)
    start = torch.zeros_like(order)
    for row, caption in enumerate(captions):
        words = torch.tensor([case["sot"], *caption, case["eot"]])
        tokens[row, : len(words)] = words
        drawn = torch.tensor(case["permutation"][row], dtype=torch.int64)
        order[row, 1 + drawn] = torch.arange(len(caption), dtype=torch.float64) / length
        places = max(len(caption) - room, 0) + 1
        start[row, 0] = (case["block_start"][row] + 0.5) / places
    policies = {
        "truncate": (TruncateText, order),
        "random": (RandomText, order),
        "shuffle": (ShuffleText, order),
        "block": (BlockText, start),
    }
    return max(
        unequal(policy(context_length=context).reduce(tokens, noise), case[name])
        for name, (policy, noise) in policies.items()
    )
