"""Parity cases of optimisation: learning rates step by step, layer-wise decay."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from case import Case, difference, unequal
from torch import nn

from pipeline.optim.groups import Rates, layer_of
from pipeline.optim.schedules import Constant, ConstantCooldown, WarmupCosine

BATCH = 8  # any: the references count steps, we count pairs


def schedules(content: dict, arrays: dict) -> Iterator[Case]:
    for name, case in content.get("open_clip", {}).items():
        yield Case(f"open_clip/{name}", partial(_open_clip, case), 1e-12)
    for name, case in content.get("eva_layer_decay", {}).items():
        yield Case(f"eva_layer_decay/{name}", partial(_layer_decay, case), 1e-12)
    if "eva_warmup_cosine" in content:
        yield Case("eva_warmup_cosine", partial(_eva_cosine, content["eva_warmup_cosine"]), 1e-12)
    for family in content.keys() - {"open_clip", "eva_layer_decay", "eva_warmup_cosine"}:
        yield Case(family, None)


def _relative(ours: object, expected: object) -> float:
    expected = np.asarray(expected, np.float64)
    scale = np.where(expected == 0, 1.0, expected)
    return difference(np.asarray(ours, np.float64) / scale, expected / scale)


def _factors(schedule: object, steps: int) -> np.ndarray:
    return np.asarray([schedule.factor(s * BATCH, steps * BATCH, BATCH) for s in range(steps)])


def _open_clip(case: dict) -> float:
    warmup, steps = case["warmup"] * BATCH, case["steps"]
    if case["kind"] == "cosine":
        schedule = WarmupCosine(warmup_samples=warmup)
    elif case["kind"] == "const":
        schedule = Constant(warmup_samples=warmup)
    elif case["kind"] == "const_cooldown":
        schedule = ConstantCooldown(
            warmup_samples=warmup,
            cooldown_fraction=case["cooldown_steps"] / steps,
            power=case["cooldown_power"],
            final_fraction=case["cooldown_end_lr"] / case["base_lr"],
        )
    else:
        raise ValueError(f"no schedule for kind {case['kind']}")
    lr = case["base_lr"] * _factors(schedule, steps)
    found = [_relative(lr, case["lr"])]
    if "lr_of_group_with_scale_025" in case:
        found.append(_relative(0.25 * lr, case["lr_of_group_with_scale_025"]))
    return max(found)


def _layer_decay(case: dict) -> float:
    """A model of empty parameters with the reference's names, through our groups."""
    model, num_blocks = nn.Module(), case["num_layers"]
    for name, ndim in case["parameter_ndim"].items():
        _hold(model, name.split("."), nn.Parameter(torch.zeros([1] * ndim)))
    listed = (f"{t}.{name}" for t, names in case["no_weight_decay"].items() for name in names)
    spared = [name for name in listed if name in case["parameter_ndim"]]
    rates = Rates(
        lr=case["lr"],
        weight_decay=case["wd"],
        towers={
            tower: {
                "lr": case[f"{tower}_lr"],
                "weight_decay": case[f"{tower}_wd"],
                "layer_decay": case[f"{tower}_ld"],
            }
            for tower in ("visual", "text")
        },
        no_decay=spared,
    )
    ours, expected = {}, {}
    for group in rates.groups(model):
        for name in group["names"]:
            tower = group["tower"] or "other"
            ours[name] = (group["base_lr"], group["weight_decay"], tower)
    for name, theirs in case["parameters"].items():
        lr = theirs["base_lr"] * theirs["lr_scale"]
        expected[name] = (lr, theirs["weight_decay"], theirs["group"])
    layers = {n: layer for n, layer in case["layer_id"].items() if layer is not None}
    return max(
        unequal(sorted(ours), sorted(expected)),
        *(_relative(ours[name][:2], expected[name][:2]) for name in expected),
        *(unequal(ours[name][2], expected[name][2]) for name in expected),
        *(unequal(layer_of(n, num_blocks=num_blocks), layer) for n, layer in layers.items()),
    )


def _hold(module: nn.Module, path: list[str], parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name."""
    *parts, last = path
    for part in parts:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(last, parameter)


def _eva_cosine(case: dict) -> float:
    factors = _factors(WarmupCosine(warmup_samples=case["warmup"] * BATCH), case["steps"])
    bases = [group["lr_scale"] * group["base_lr"] for group in case["groups"]]
    return _relative(np.outer(factors, bases), case["lr"])
