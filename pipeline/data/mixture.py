"""What a stream reads: one dataset or several with weights, each large enough for its share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def sources(
    shards: str | None, mixture: Sequence[Mapping[str, Any]] | None
) -> tuple[list[str], list[float]]:
    """(where, weight) of each dataset. Raises ValueError when not exactly one of them is given, or
    an entry of the mixture is none.
    """
    if (shards is None) == (not mixture):
        raise ValueError("give data.shards (one dataset) or data.mixture (several), not both")
    if shards is not None:
        return [shards], [1.0]
    for number, entry in enumerate(mixture):
        if not _is_entry(entry):
            found = dict(entry) if isinstance(entry, Mapping) else repr(entry)
            raise ValueError(
                f"data.mixture[{number}] {found}: needs shards, and a weight above 0, as in "
                "{shards: DIR, weight: 1}"
            )
    return [entry["shards"] for entry in mixture], [entry["weight"] for entry in mixture]


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or set(entry) != {"shards", "weight"}:
        return False
    shards, weight = entry["shards"], entry["weight"]
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return isinstance(shards, str) and shards != "" and number and 0 < weight < math.inf


def refuse_few_pairs(
    names: Sequence[str],
    pairs: Sequence[int | float],
    weights: Sequence[float],
    global_batch_size: int,
) -> None:
    """Raise ValueError for a dataset with fewer pairs than its share of a batch.

    pairs: of an epoch; a float is an average.
    """
    for number, (name, found, weight) in enumerate(zip(names, pairs, weights, strict=True)):
        others = sum(weights) - weight
        # weights are rounded, and that is no pair more
        needed = math.ceil(global_batch_size * weight / sum(weights) - 1e-9)
        if found >= max(needed, 1):
            continue
        what, asked = f"data.shards={name}", f"one batch of {global_batch_size}"
        mend = "lower global_batch_size"
        if others:
            what = f"data.mixture[{number}] {name}"
            asked = (
                f"the {needed} that weight {weight:g} asks for in a batch of {global_batch_size}"
            )
            largest = 0.995 * found * others / (global_batch_size - found)  # .3g may round up
            mend = f"lower its weight to {largest:.3g} or less, or global_batch_size"
        if not found:
            raise ValueError(f"{what} holds no pairs")
        count = f"{found} pairs" if isinstance(found, int) else f"{found:.3g} pairs an epoch"
        raise ValueError(
            f"{what} holds {count}, fewer than {asked}: a batch would hold pairs twice; {mend}"
        )
