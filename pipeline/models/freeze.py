"""Which parameters learn."""

import fnmatch
from collections.abc import Sequence

from torch import nn


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose names match do not learn. Raises ValueError for a pattern without any."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(
                f"frozen: no parameter is called {pattern!r}; names are like {next(iter(names))}: "
                "give 'image.*' for a whole tower"
            )
        for name in found:
            names[name].requires_grad_(False)
