"""The figures of earns_its_place.py as Markdown tables: what is compared, and what is noise."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.shards import write_atomically


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of a table. better: 1 if more is better, -1 if less is, 0 for a description."""

    label: str
    key: str  # task/metric
    better: int = 1
    percent: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms; the first figure decides."""

    base: str
    arm: str
    figures: tuple[Figure, ...]


TOP1 = Figure(label="zero-shot top-1", key="zero_shot/top1")
TOP5 = Figure(label="zero-shot top-5", key="zero_shot/top5")
RETRIEVAL = Figure(label="text to image R@1", key="retrieval/text_to_image_r_at_1")
GROUPS = tuple(
    Figure(label=f"{group} classes, top-5", key=f"by_frequency/{group}_top5")
    for group in ("tail", "middle", "head")
)
READING = (
    Figure(label="pull of the written word's class", key="text_spotting/pull", better=-1),
    Figure(label="drop of top-5 under the word", key="text_spotting/drop_top5", better=-1),
    Figure(label="taken for the word", key="text_spotting/attack_success", better=-1),
    Figure(label="... under an empty strip", key="text_spotting/attack_success_band", better=0),
    Figure(
        label="Sync: percentile of a drawn word", key="text_spotting/sync_percentile", better=-1
    ),
    Figure(label="Sync: cosine", key="text_spotting/sync_cosine", better=-1, percent=False),
    TOP5,
)
CORRELATION = Figure(
    label="rank correlation of frequency and accuracy",
    key="by_frequency/correlation_percentile",
    better=0,
    percent=False,
)
COMPARISONS = {
    "balanced": Comparison(
        base="raw", arm="balanced", figures=(*GROUPS, CORRELATION, TOP5, RETRIEVAL)
    ),
    "parrot": Comparison(base="raw", arm="parrot", figures=READING),
    "planted_parrot": Comparison(base="planted", arm="planted_parrot", figures=READING),
    "no_text": Comparison(base="raw", arm="no_text", figures=READING),
    "covariance": Comparison(base="random", arm="covariance", figures=(TOP5, TOP1, RETRIEVAL)),
    "recaptioned": Comparison(base="raw", arm="recaptioned", figures=(RETRIEVAL, TOP5, TOP1)),
}


def shown(values: list[float], figure: Figure) -> str:
    """mean ± standard deviation."""
    scale, digits = (100, 2) if figure.percent else (1, 3)
    text = f"{scale * mean(values):.{digits}f}"
    return text + (f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else "")


def difference(base: list[float], arm: list[float], figure: Figure) -> tuple[float, float]:
    """(arm - base, twice the standard error of it); the latter is infinite for a single seed."""
    if min(len(base), len(arm)) < 2:
        return mean(arm) - mean(base), float("inf")
    error = sum(stdev(values) ** 2 / len(values) for values in (base, arm)) ** 0.5
    return mean(arm) - mean(base), 2 * error


def verdict(base: list[float], arm: list[float], figure: Figure) -> str:
    """better, worse, or no difference that exceeds twice its standard error."""
    gain, noise = difference(base, arm, figure)
    if abs(gain) <= noise or not figure.better:
        return "within the noise" if figure.better else ""
    return "better" if gain * figure.better > 0 else "worse"


def table(comparison: Comparison, figures: dict[str, Any]) -> str:
    """Markdown: a row a figure; the deciding one first, in bold."""
    names = (comparison.base, comparison.arm)
    if any(name not in figures["arms"] for name in names):
        return "Not measured."
    arms = [figures["arms"][name] for name in names]
    heads = [f"{name}, {arm['pairs']:,} pairs" for name, arm in zip(names, arms, strict=True)]
    lines = [f"| | {heads[0]} | {heads[1]} | difference | |", "|---|---|---|---|---|"]
    for number, figure in enumerate(comparison.figures):
        base, arm = (
            [values[f"eval/{figure.key}"] for values in found["seeds"].values()] for found in arms
        )
        gain, noise = difference(base, arm, figure)
        scale, digits = (100, 2) if figure.percent else (1, 3)
        limit = f"2 s.e. {scale * noise:.{digits}f}" if math.isfinite(noise) else "one seed"
        change = f"{scale * gain:+.{digits}f} ({limit})"
        label = f"**{figure.label}**" if number == 0 else figure.label
        cells = (label, shown(base, figure), shown(arm, figure), change)
        lines.append(f"| {' | '.join(cells)} | {verdict(base, arm, figure)} |")
    dropped = "; ".join(
        f"{name}: " + ", ".join(f"{reason} {count:,}" for reason, count in arm["dropped"].items())
        for name, arm in zip(names, arms, strict=True)
    )
    seeds = ", ".join(arms[1]["seeds"])
    about = f"{figures['samples_seen']:,} pairs seen, seeds {seeds}. Dropped: {dropped}."
    return "\n".join([*lines, "", about])


def fill(page: Path, figures: dict[str, Any]) -> None:
    """Write each measured comparison's table between its markers."""
    text = page.read_text(encoding="utf-8")
    for name, comparison in COMPARISONS.items():
        block = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"{page} has no '<!-- table: {name} -->' ... '<!-- end -->'")
        filled = table(comparison, figures)
        text = block.sub(lambda m, filled=filled: f"{m[1]}{filled}\n{m[2]}", text)
    write_atomically(page, text.encode())
