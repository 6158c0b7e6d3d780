"""What a parity case is, and how two results are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """measure() gives the largest difference, infinite where lists, sets or shapes differ.

    measure is None where we have no code for the case yet.
    """

    name: str
    measure: Callable[[], float] | None
    tolerance: float = 0.0


def unequal(ours: Any, expected: Any) -> float:
    """0 if equal in shape and every value, else infinite."""
    return 0.0 if np.array_equal(ours, expected) else np.inf


def difference(ours: Any, expected: Any) -> float:
    """Largest absolute difference; NaN equals NaN."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    if ours.shape != expected.shape or not np.array_equal(np.isnan(ours), np.isnan(expected)):
        return np.inf
    compared = ~np.isnan(ours)
    return float(np.abs(ours[compared] - expected[compared]).max(initial=0.0))
