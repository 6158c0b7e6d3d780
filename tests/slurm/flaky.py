"""An annotator that fails as often as told: for the engines' tests, found by PYTHONPATH."""

import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa


class Flaky:
    """The number in a caption, as a score. FLAKY_FAILURES: a folder; for each file in it one unit
    fails, in whatever process it runs. FLAKY_SECONDS: how long a unit takes.
    """

    name, version = "flaky", 1
    needs_images = False
    reads = ("caption",)
    rows_per_unit = rows_per_save = 5  # what makes it Costly: 12 units of the 60 pairs

    def __init__(self) -> None:
        self.columns, self.inputs = {"luck": pa.float64()}, {}

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        time.sleep(float(os.environ.get("FLAKY_SECONDS", "0")))
        if "FLAKY_FAILURES" in os.environ:
            for ticket in Path(os.environ["FLAKY_FAILURES"]).iterdir():
                try:
                    ticket.unlink()  # one process gets it
                except FileNotFoundError:
                    continue
                raise RuntimeError("the disk of this node is on fire")
        return [{"luck": float(sample["caption"].split()[-1])} for sample in batch]
