"""The demo's last step: summary.json, a table in the terminal, and one page to look at.

python examples/emoji/summarise.py --out runs/demo --seeds 0 1 2
"""

import argparse
import base64
import html
import io
import json
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from curation.report import svg
from pipeline.data.images import decode
from pipeline.evals.labelled_images import LabelledImages, prompt
from pipeline.evals.trained import TrainedClip
from pipeline.shards import read_manifest, write_atomically, write_json
from pipeline.tracking.metrics import read_metrics

ARMS = ("curated", "raw")
METRICS = {
    "top1": ("zero_shot", "top1"),
    "top5": ("zero_shot", "top5"),
    "r_at_1": ("retrieval", "text_to_image_r_at_1"),
}
CHANCE_TOP5 = 5 / 1190
QUERIES = ("red apple", "dog face", "snowflake", "airplane", "guitar", "pizza", "rainbow", "key")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2730 }
body { max-width: 1000px; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 2em; font-size: 1.2em } small, .note { color: #66727f }
table { border-collapse: collapse } td, th { padding: .35em .9em; text-align: right }
tr { border-bottom: 1px solid #e3e8ec } td:first-child, th:first-child { text-align: left }
.hits { display: flex; gap: 6px } .hits img { width: 56px; height: 56px; border-radius: 6px }
.hits img { border: 3px solid #eef1f3; padding: 2px } .hits img.right { border-color: #3c9a5f }
.hits { min-width: 410px } svg { max-width: 100%; height: auto }
table.pictures th { text-align: left }
""".strip()


def arm(out: Path, name: str, seeds: list[int]) -> dict[str, Any]:
    """Means over seeds, and each seed's numbers."""
    rows = []
    for seed in seeds:
        run = out / f"{name}-seed{seed}"
        row: dict[str, Any] = {"seed": seed}
        for metric, (task, key) in METRICS.items():
            found = json.loads((run / "eval" / f"{task}.json").read_text())["metrics"]
            row[metric] = found[f"eval/{task}/{key}"]
        row["samples_seen"] = read_metrics(run)[-1]["samples_seen"]
        rows.append(row)
    means = {metric: mean(row[metric] for row in rows) for metric in METRICS}
    return {**means, "samples_seen": rows[0]["samples_seen"], "seeds": rows}


def pairs(out: Path) -> dict[str, Any]:
    """Read, kept, and dropped as step/reason, over the whole curation."""
    steps = read_manifest(out / "curated")["steps"]
    dropped = {
        f"{step['name']}/{reason}": count
        for step in steps
        for reason, count in step["dropped"].items()
    }
    return {"read": steps[0]["read"], "kept": steps[-1]["kept"], "dropped": dropped}


def seconds(out: Path) -> dict[str, int]:
    """Seconds by stage; stages that ran several times (seeds, restarts) are summed."""
    spent: Counter[str] = Counter()
    for line in (out / "seconds.txt").read_text().splitlines():
        name, value = line.split()
        spent[name] += int(value)
    return dict(spent)


def spread(values: list[float]) -> str:
    """mean +- standard deviation in percent."""
    text = f"{100 * mean(values):.1f} %"
    return text + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """metric, raw, curated, ratio."""
    names = {
        "top1": "zero-shot top-1",
        "top5": f"zero-shot top-5 (chance {100 * CHANCE_TOP5:.2f} %)",
        "r_at_1": "text to image R@1",
    }
    found = []
    for metric, name in names.items():
        raw, curated = (
            [row[metric] for row in summary[which]["seeds"]] for which in ("raw", "curated")
        )
        ratio = mean(curated) / mean(raw) if mean(raw) else float("nan")
        found.append((name, spread(raw), spread(curated), f"{ratio:.2f} x"))
    return found


def nearest(run: Path, images: list[bytes], captions: list[str], most: int = 6) -> torch.Tensor:
    """(captions, most) indices of the images nearest to each caption."""
    trained = TrainedClip.load(run)
    scores = trained.text_embed(captions) @ trained.image_embed(images).T
    return scores.topk(most, dim=1).indices


def retrieval_section(out: Path, seed: int, data: Path) -> str:
    """For a few captions, what either model finds among all evaluation images."""
    labelled = LabelledImages(data)
    names, template = labelled.class_names(), labelled.templates()[0]
    samples = list(labelled.samples())
    images, labels = [image for image, _ in samples], [label for _, label in samples]
    queries = [name for name in QUERIES if name in names]
    captions = [prompt(template, name) for name in queries]
    found = {which: nearest(out / f"{which}-seed{seed}", images, captions) for which in ARMS}
    body = []
    for number, name in enumerate(queries):
        cells = []
        for which in ("raw", "curated"):
            pictures = "".join(
                f"<img class='{'right' if names[labels[i]] == name else ''}' "
                f"title='{html.escape(names[labels[i]])}' src='{thumbnail(images[i])}' alt=''>"
                for i in found[which][number].tolist()
            )
            cells.append(f"<td><div class=hits>{pictures}</div>")
        body.append(f"<tr><td>{html.escape(name)}{''.join(cells)}")
    return f"<table class=pictures><tr><th>caption<th>raw<th>curated{''.join(body)}</table>"


def thumbnail(data: bytes) -> str:
    """A picture as a data address."""
    image = decode(data)
    image.thumbnail((56, 56))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def loss_curves(out: Path, seeds: list[int]) -> str:
    """Training loss by pairs seen, an inline SVG."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    for which, colour in (("raw", "#9aa7b2"), ("curated", "#2f7ea8")):
        for seed in seeds:
            history = read_metrics(out / f"{which}-seed{seed}")
            axis.plot(
                [row["samples_seen"] for row in history],
                [row["train/loss"] for row in history],
                color=colour,
                lw=1.2,
                label=which if seed == seeds[0] else None,
            )
    axis.set(xlabel="pairs seen", ylabel="training loss")
    axis.legend()
    return svg(figure)


def page(out: Path, summary: dict[str, Any], seeds: list[int], data: Path) -> str:
    """The whole page."""
    table = "".join(f"<tr><td>{'<td>'.join(row)}" for row in rows(summary))
    kept, read = summary["pairs"]["kept"], summary["pairs"]["read"]
    dropped = "".join(
        f"<tr><td>{html.escape(reason)}<td>{count:,}"
        for reason, count in summary["pairs"]["dropped"].items()
    )
    spent = "".join(f"<tr><td>{name}<td>{value}" for name, value in summary["seconds"].items())
    return f"""<!doctype html><meta charset=utf-8><title>pairwright demo</title>
<style>{STYLE}</style>
<h1>The same training, with and without curation</h1>
<p>{verdict(summary)}</p>
<table><tr><th>held-out family, 1,190 classes<th>raw<th>curated<th>ratio{table}</table>
<p class=note>{summary["raw"]["samples_seen"]:,} pairs seen in either run; seeds
{", ".join(map(str, seeds))}.</p>
<h2>Captions and the images nearest to them</h2>
<p class=note>A green frame is the right drawing.</p>
{retrieval_section(out, seeds[0], data)}
<h2>Training loss</h2>
<p class=note>Not a comparison of quality: clean pairs are easier, in both senses.</p>
{loss_curves(out, seeds)}
<h2>What curation did</h2>
<p>{kept:,} of {read:,} pairs kept. <a href="curated/report.html">The report with pictures of what
each step threw away</a>.</p>
<table><tr><th>step / reason<th>dropped{dropped}</table>
<h2>Seconds</h2>
<table><tr><th>stage<th>seconds{spent}</table>
"""


def verdict(summary: dict[str, Any]) -> str:
    """One honest sentence."""
    curated, raw = summary["curated"]["top5"], summary["raw"]["top5"]
    if curated > raw:
        return f"Curated beats raw: top-5 {100 * curated:.1f} % against {100 * raw:.1f} %."
    return (
        f"Curated does NOT beat raw: top-5 {100 * curated:.1f} % against {100 * raw:.1f} %. "
        "Expected after a shortened run (STEPS below 800); otherwise look at curated/report.html."
    )


def main() -> None:
    """Read what the stages left, write summary.json and index.html, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--data", type=Path, default=Path("examples/emoji/eval"))
    options = parser.parse_args()
    out, seeds = options.out, options.seeds
    summary = {name: arm(out, name, seeds) for name in ARMS}
    summary |= {"pairs": pairs(out), "seconds": seconds(out)}
    write_json(out / "summary.json", summary)
    write_atomically(out / "index.html", page(out, summary, seeds, options.data).encode())
    table = Table(title="held-out family, 1,190 classes", title_justify="left")
    for column in ("", "raw", "curated", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows(summary):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(verdict(summary))
    total = sum(summary["seconds"].values())
    console.print(f"{total // 60} min {total % 60} s; page: {out}/index.html")
    console.print(f"numbers: {out}/summary.json; what curation did: {out}/curated/report.html")


if __name__ == "__main__":
    main()
