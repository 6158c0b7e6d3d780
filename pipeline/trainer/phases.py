"""What the end of one phase hands to the next: weights that fit, optimizer state by name."""

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)


def carried_state(saved: dict[str, Any], fresh: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict for `fresh`, with what `saved` holds under the same parameter names.

    Hyper-parameters are those of `fresh`. A parameter that is new in it (it was frozen), or has
    another shape (a resized position table), starts without moments. Its shape is what all tensors
    of its state together have: Adafactor keeps rows and columns apart.
    Both need `names` in their groups (`pipeline.optim.groups`).
    """
    known = {
        name: saved["state"][index]
        for group in saved["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
        if index in saved["state"]
    }
    result, new = fresh.state_dict(), []
    for group, live in zip(result["param_groups"], fresh.param_groups, strict=True):
        for name, index, parameter in zip(
            group["names"], group["params"], live["params"], strict=True
        ):
            state = known.get(name)
            if state is not None and _shape_of(state) in (parameter.shape, torch.Size()):
                result["state"][index] = state
            else:
                new.append(name)
    if new:
        log.info("%d parameters start without optimizer state: %s", len(new), ", ".join(new[:5]))
    return result


def _shape_of(state: dict[str, Any]) -> torch.Size | None:
    """Of the parameter that a state belongs to; None for tensors that make up no shape."""
    tensors = (value for value in state.values() if isinstance(value, torch.Tensor))
    try:
        return torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:
        return None
