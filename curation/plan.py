"""How long will a curation take? Throughput measured on a sample, times the size of the pool.

Each annotator runs in this process on the sample, a first batch of it outside the clock (models
load once). The prediction is work divided by workers: it knows nothing of queues, nor of a shared
file system that slows down under many readers.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from curation.ingest import identity, read_samples
from curation.pool import Facts, Pool, images_of

WARM_UP = 16  # pairs annotated before the clock starts


@dataclass(frozen=True)
class Cost:
    """pairs_per_second: of one worker; device: what one worker occupies, cpu or a GPU."""

    stage: str
    pairs_per_second: float
    device: str

    def hours(self, pairs: int, workers: int) -> float:
        """Wall hours with `workers` side by side."""
        return pairs / self.pairs_per_second / workers / 3600


def pool_size(pool: Pool) -> tuple[int, bool]:
    """(pairs in the pool, whether that is a count). Tars are estimated from the first one."""
    pairs, counted, per_byte = 0, True, 0.0
    for file in pool.files:
        marker = pool.place(file) / "counts.json"
        if marker.exists():
            pairs += json.loads(marker.read_text())["read"]
        elif file.suffix == ".parquet":
            with file.open("rb") as stream:
                pairs += pq.read_metadata(stream).num_rows
        else:
            if not per_byte:
                per_byte = sum(1 for _ in read_samples(file)) / max(identity(file)["bytes"], 1)
            pairs, counted = pairs + round(per_byte * identity(file)["bytes"]), False
    return pairs, counted


def ingest_cost(pool: Pool) -> Cost:
    """Ingest of the smallest pool file, as a whole."""
    file = min(pool.files, key=lambda path: identity(path)["bytes"])
    start = time.perf_counter()
    counts = pool.ingest.run(file)[2]
    seconds = time.perf_counter() - start
    return Cost("ingest", max(counts["read"], 1) / seconds, "cpu")


def annotator_cost(pool: Pool, name: str, fact: Facts, config: Mapping[str, Any], sample: int):
    """One annotator over the first `sample` rows of the pool. Needs the ingested rows."""
    file = next(f for f in pool.files if pool.num_rows(f))
    rows = pq.read_table(pool.place(file) / "rows.parquet").slice(0, sample + WARM_UP)
    batch = rows.select(["uid", *fact.annotator.reads]).to_pylist()
    seconds_to_read = 0.0
    if fact.annotator.needs_images:
        start = time.perf_counter()
        for row, image in zip(batch, images_of(file, rows), strict=True):
            row["image"] = image
        seconds_to_read = time.perf_counter() - start
    warm = min(WARM_UP, len(batch) - 1)
    fact.annotator.annotate(batch[:warm])
    start = time.perf_counter()
    fact.annotator.annotate(batch[warm:])
    seconds = time.perf_counter() - start + seconds_to_read
    device = str(config.get("device", "cpu"))
    return Cost(name, (len(batch) - warm) / seconds, device)


def table(costs: list[Cost], pairs: int, *, counted: bool, nodes: int, workers: int) -> Table:
    """Hours of each stage, and of all."""
    about = "" if counted else "about "
    title = f"{about}{pairs:,} pairs, {nodes} node(s) x {workers} workers"
    view = Table(title=title, title_justify="left", show_footer=True)
    hours = [cost.hours(pairs, nodes * workers) for cost in costs]
    on_gpu = [not cost.device.startswith("cpu") for cost in costs]
    gpu = sum(h * nodes * workers for h, g in zip(hours, on_gpu, strict=True) if g)
    footers = ("all", "", f"{sum(hours):,.3g}", f"{sum(hours) * nodes * workers - gpu:,.3g}")
    names = ("stage", "pairs/s and worker", "hours", "CPU worker hours", "GPU hours")
    for name, footer in zip(names, (*footers, f"{gpu:,.3g}"), strict=True):
        view.add_column(name, footer, justify="left" if name == "stage" else "right")
    for cost, took, on in zip(costs, hours, on_gpu, strict=True):
        work = f"{took * nodes * workers:,.3g}"
        cells = ("0", work) if on else (work, "0")
        view.add_row(cost.stage, f"{cost.pairs_per_second:,.0f}", f"{took:,.3g}", *cells)
    return view
