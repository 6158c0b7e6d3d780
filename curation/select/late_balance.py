"""Selector: leave the balance to the loader (MetaCLIP 2, arXiv:2507.22062, sec. 3; its released
loader draws once per pass).

An early balance throws most of the head away for good. Here every matched pair stays, with its
inclusion probability in the shards' stats; `data.late_balance=true` then shows the trainer a pair
in each epoch with that probability, another draw every time.
"""

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from curation.select.balance import Balance, Balanced, unmatched


class LateBalance:
    """Scores every pair with `inclusion_probability`, 1 - prod(1 - t / max(count, t)), and drops
    only what has no entry ("no_entry").

    Arguments as in `curation.select.balance.Balance`. With drop_unmatched=false pairs without an
    entry stay, at probability 1. Run it last: t refers to the surviving pairs.
    Price: as the balance, and shards for the whole head; an epoch then has fewer pairs than the
        shards (their probabilities' sum on average).
    """

    name = "late_balance"
    version = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"inclusion_probability": pa.float64()}

    def __init__(
        self,
        *,
        max_pairs_per_entry: float | None = None,
        tail_fraction: float | None = None,
        drop_unmatched: bool = True,
        per_language: bool = False,
        main_language: str = "en",
    ):
        self.balance = Balance(
            max_pairs_per_entry=max_pairs_per_entry,
            tail_fraction=tail_fraction,
            drop_unmatched=drop_unmatched,
            per_language=per_language,
            main_language=main_language,
        )
        self.reads = self.balance.reads

    def measure(self, part: pa.Table) -> Any:
        """Counts, as the balance."""
        return self.balance.measure(part)

    def combine(self, measures: list[Any]) -> dict[str, Balanced]:
        """Probabilities of entries, as the balance."""
        return self.balance.combine(measures)

    def apply(self, part: pa.Table, combined: dict[str, Balanced], seed: int) -> pa.Array:
        """no_entry, or null."""
        dropped = unmatched(part) & self.balance.drop_unmatched
        return pa.array(np.where(dropped, "no_entry", None).astype(object), pa.string())

    def score(
        self, part: pa.Table, combined: dict[str, Balanced], seed: int
    ) -> dict[str, pa.Array]:
        """The same whatever the seed: the draws are the loader's."""
        inclusion = self.balance.inclusion(part, combined)
        if not self.balance.drop_unmatched:
            inclusion[unmatched(part)] = 1.0
        return {"inclusion_probability": pa.array(inclusion, pa.float64())}
