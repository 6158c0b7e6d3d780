"""Costs as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from pipeline.cost.phase import PEAK_FLOPS, STRATEGIES, PhaseCost

GPU_BYTES = 80e9  # of an A100-80 and of an H100
SPARE = 0.1  # what fragments, kernels' workspaces and NCCL take


def run_table(costs: Sequence[PhaseCost], mfu: float) -> Table:
    """A column for each phase, and one for the sum where there are several."""
    table = Table(title="cost", title_justify="left")
    table.add_column()
    for cost in costs:
        table.add_column(cost.phase.name or "run", justify="right")
    several = len(costs) > 1
    if several:
        table.add_column("all", justify="right")

    def row(name: str, cells: list[str], total: str = "") -> None:
        table.add_row(name, *cells, *([total] if several else []))

    row("steps", [f"{c.phase.steps:,}" for c in costs], f"{sum(c.phase.steps for c in costs):,}")
    pairs = [c.phase.samples for c in costs]
    row("pairs", [f"{n / 1e6:,.1f} M" for n in pairs], f"{sum(pairs) / 1e6:,.1f} M")
    row("pairs a GPU and step", [_micro_batches(c) for c in costs])
    row("pixels", [f"{c.image_size}" for c in costs])
    row("patches seen", [f"{c.kept} of {c.patches}" for c in costs])
    row("text positions seen", [f"{c.words} of {c.caption}" for c in costs])
    row("parameters", [f"{c.parameters / 1e6:,.1f} M" for c in costs])
    row("GFLOPs, image forward", [f"{c.image.flops / 1e9:,.2f}" for c in costs])
    row("GFLOPs, text forward", [f"{c.text.flops / 1e9:,.2f}" for c in costs])
    row("GFLOPs, pair and step", [f"{c.flops_per_pair / 1e9:,.1f}" for c in costs])
    row("FLOPs", [f"{c.flops:.3g}" for c in costs], f"{sum(c.flops for c in costs):.3g}")
    for name, peak in PEAK_FLOPS.items():
        hours = [c.gpu_hours(peak, mfu) for c in costs]
        row(f"{name} hours", [_hours(h) for h in hours], _hours(sum(hours)))
    return table


def memory_table(cost: PhaseCost) -> Table:
    """A row for each strategy: GB on one GPU."""
    parts = list(cost.memory("DDP"))
    title = f"GB on each of {cost.world_size:,} GPUs" + (
        f", {cost.phase.name}" if cost.phase.name else ""
    )
    table = Table(title=title, title_justify="left")
    for name in ("", *parts, "all", "micro-batch in 80 GB"):
        table.add_column(name, justify="right" if name else "left")
    for strategy in STRATEGIES:
        memory = cost.memory(strategy)
        fits = cost.largest_micro_batch(strategy, GPU_BYTES * (1 - SPARE))
        table.add_row(
            strategy,
            *(_gigabytes(memory[part]) for part in parts),
            _gigabytes(sum(memory.values())),
            f"{fits:,}" if fits else "none",
        )
    return table


def cost_tables(costs: Sequence[PhaseCost], mfu: float) -> Group:
    """Everything about a run's phases."""
    return Group(
        run_table(costs, mfu),
        f"GPU-hours at {mfu:.0%} of the bf16 peak, recomputation counted: an assumption (mfu=...)",
        *(memory_table(cost) for cost in costs),
        f"micro-batch in 80 GB: the most pairs of a forward, {SPARE:.0%} spared",
    )


def _micro_batches(cost: PhaseCost) -> str:
    number = -(-cost.local // cost.micro)
    return f"{cost.local:,}" + (f" in {number:,}" if number > 1 else "")


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f}" if count < 1e10 else f"{count / 1e9:,.0f}"
