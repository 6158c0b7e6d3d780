"""Steps whose gradient was not finite: left out, counted, and the end of a run if they go on."""

from collections.abc import Callable
from pathlib import Path


class SkippedSteps:
    """limit: skipped steps in a row; one more ends the run. Single ones are normal: bad batches,
    and the loss scale of float16 finding its size.
    """

    def __init__(self, *, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"max_skipped_steps {limit} is negative")
        self.limit = limit
        self.total = self.in_a_row = 0

    def record(
        self, applied: bool, *, samples_seen: int, last_good: Callable[[], Path | None]
    ) -> None:
        """Raises ValueError at the limit. last_good(): the newest checkpoint, which is good
        since skipped steps changed no weight.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied
        if self.in_a_row > self.limit:
            good = last_good()
            raise ValueError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row (now "
                f"at {samples_seen} pairs), max_skipped_steps={self.limit}. The last good "
                f"checkpoint is {good or 'none, the run has not reached its first'}: begin a new "
                "run with name=NEW and gradient_clip_norm=1 or a lower optimizer.lr"
                + (
                    f", from these weights with init=weights init.model={good} (moments, schedule "
                    "and order of the data begin anew)"
                    if good
                    else ""
                )
            )
