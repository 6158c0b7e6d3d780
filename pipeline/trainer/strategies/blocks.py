"""Where a model is cut: transformer blocks, then towers."""

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every nn.ModuleList in a model's children (its towers), inner lists first.

    What a transformer repeats is in a list, in our towers and in transformers' alike: the unit that
    is gathered, freed or compiled on its own.
    """
    lists = [
        module
        for tower in model.children()
        for module in tower.modules()
        if isinstance(module, nn.ModuleList)
    ]
    return [
        block
        for members in reversed(lists)
        for block in members
        if any(True for _ in block.parameters())
    ]
