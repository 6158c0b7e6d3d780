"""First values for a model that was built without memory.

with torch.device("meta"):
    model = build(config)
model.to_empty(device=...)
initialise(model)
"""

import torch
from torch import nn


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Draw every parameter and fill every buffer anew, from torch's global generator.

    Parts come before wholes: torch's own layers first (`reset_parameters`), then ours
    (`initialise`), each of which sets what is its own choice. `initialise_whole` sets all below it.
    The distribution is that of ordinary construction; the draws come in another order.
    Raises ValueError for a module whose values nobody would set.
    """
    if hasattr(model, "initialise_whole"):
        model.initialise_whole()
        return
    for child in model.children():
        initialise(child)
    for method in ("initialise", "reset_parameters"):
        if hasattr(model, method):
            getattr(model, method)()
            return
    own = [name for name, _ in model.named_parameters(recurse=False)]
    own += [name for name, _ in model.named_buffers(recurse=False)]
    if own:
        raise ValueError(
            f"{type(model).__name__} has values {own} and no initialise() or "
            "reset_parameters() to set them: give it one"
        )
