"""Parameters without dimensions, which neither FSDP2 nor DeepSpeed can cut or send."""

import torch
from torch import nn


def widen_scalars(module: nn.Module) -> dict[str, torch.Size]:
    """Give them one dimension of size 1, in place; returns all parameters' shapes from before.

    To be called before an optimizer is made. Checkpoints hold the shapes from before.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                wider = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(owner, name, wider)
    return shapes
