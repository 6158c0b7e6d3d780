"""The parameters inside the tensors that a strategy hands an optimizer.

Usually a tensor is a parameter. ZeRO hands over flat pieces of many, of which a rank holds a part:
an optimizer that needs a norm of each parameter asks its `parts`, which a strategy may replace.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.optim.groups import check_whole


class Whole:
    """A tensor is a parameter."""

    def check(self, groups: Sequence[Mapping[str, Any]], what: str) -> None:
        """Raise ValueError if that is not so."""
        check_whole(groups, what)

    def cut(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Of each parameter its part in `values`, as views; values: one like each of params.

        As many parts, in the same order, on every rank; a part may be empty.
        """
        return list(values)

    def norms(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The 2-norm of each parameter whose part is given, over all ranks. A collective."""
        return list(torch._foreach_norm(parts))
