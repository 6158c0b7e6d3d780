"""Which parameters weight decay pulls on."""

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for a torch optimizer: decayed parameters, then those of at most one dimension.

    The second is not decayed: biases, norms, the class token, the logit scale (CLIP,
    arXiv:2103.00020, sec. 2.5: "all weights that are not gains or biases"). Embeddings and
    positions are decayed, as in open_clip.
    Frozen parameters are left out. `group["names"]` holds the parameters' names in order.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[parameter.ndim <= 1]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups
