"""report.html: a run for a person to look at, without any server.

Built from what lies in the run directory: metrics.jsonl, config.yaml, eval/*.json, alerts.jsonl,
media/, and the manifest of the shards it reads. Works for a run that is going on, or was killed.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from omegaconf import DictConfig, OmegaConf

from pipeline.shards import read_manifest, write_atomically
from pipeline.tracking.panels import SECTIONS, X_AXIS, Panel

MOST_POINTS = 1500  # of a curve; a longer one is drawn by the mean of so many pieces
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2730 }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { margin-top: 2em; font-size: 1.2em } .note { color: #66727f }
table { border-collapse: collapse; width: 100% } td, th { padding: .3em .6em; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr { border-bottom: 1px solid #e3e8ec } svg { max-width: 100%; height: auto }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 10px }
.tile { background: #f6f8f9; border-radius: 6px; padding: .6em .8em }
.tile b { display: block; font-size: 1.35em } .alert { color: #b3541e }
figure { margin: 0 } img { max-width: 100% } figcaption { color: #66727f }
""".strip()
Rows = Sequence[Mapping[str, float]]


def write_page(run: str | Path) -> Path:
    """Write <run>/report.html and return its path. Raises ValueError if `run` is no run."""
    path = Path(run) / "report.html"
    write_atomically(path, page(Path(run)).encode())
    return path


def page(run: Path) -> str:
    """The whole page. Raises ValueError where there is no config.yaml."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}/config.yaml is missing: give run=runs/N, a run of pipeline.train")
    config = OmegaConf.load(run / "config.yaml")
    rows = read_rows(run / "metrics.jsonl")
    body = [
        f"<h1>{html.escape(str(config.name))}</h1>",
        *tiles(config, rows),
        *expected(config),
        *alerts(run),
        *plots(rows),
        *results(run),
        *curation(config),
        *media(run),
        *whole_config(config),
    ]
    title = html.escape(str(config.name))
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n"
        + "\n".join(body)
        + "\n"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a line that is torn, or being written, is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def tiles(config: DictConfig, rows: Rows) -> list[str]:
    """What one asks first: how far, how fast, how good."""
    last: dict[str, float] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if value is not None}
    seen, total = last.get(X_AXIS, 0), config.get("samples_seen") or 0
    shown = {"pairs seen": f"{seen:,.0f}"}
    if total:
        shown["of the run"] = f"{100 * seen / total:.0f} %"
    for name, key, form in (
        ("loss", "train/loss", "{:.3f}"),
        ("logit scale", "train/logit_scale", "{:.1f}"),
        ("pairs per second", "perf/pairs_per_second", "{:,.0f}"),
        ("waiting for data", "perf/data_wait_fraction", "{:.1%}"),
        ("MFU", "perf/mfu", "{:.1%}"),
        ("peak memory, GiB", "perf/peak_memory_gib", "{:.2f}"),
        ("steps skipped", "train/skipped_steps", "{:.0f}"),
    ):
        if key in last:
            shown[name] = form.format(last[key])
    inside = "".join(f"<div class=tile>{name}<b>{value}</b></div>" for name, value in shown.items())
    return [f"<div class=tiles>{inside}</div>"]


def expected(config: DictConfig) -> list[str]:
    """What the recipe promises, and where it comes from."""
    facts = config.get("recipe_info") or {}
    if not facts:
        return []
    cells = "".join(
        f"<tr><td>{html.escape(str(name))}<td>{html.escape(str(value))}"
        for name, value in facts.items()
    )
    return ["<h2>The recipe</h2>", f"<table>{cells}</table>"]


def alerts(run: Path) -> list[str]:
    """What the alerts callback has noticed, the newest first."""
    rows = read_rows(run / "alerts.jsonl")
    if not rows:
        return []
    lines = ""
    for row in rows[::-1][:20]:
        title, text = (html.escape(str(row.get(key, ""))) for key in ("title", "text"))
        lines += f"<tr><td class=n>{row.get(X_AXIS, 0):,}<td class=alert>{title}<td>{text}"
    note = f"<p class=note>{len(rows)} in all</p>" if len(rows) > 20 else ""
    head = "<tr><th class=n>pairs seen<th>alert<th>"
    return ["<h2>Alerts</h2>", f"<table>{head}{lines}</table>{note}"]


def plots(rows: Rows) -> list[str]:
    """Every section that has something to show, and a last one for keys that no panel knows."""
    keys = sorted({key for row in rows for key in row} - {X_AXIS, "step"})
    found, left = [], set(keys)
    for section in SECTIONS:
        drawn = [(p, [k for k in keys if p.matches(k)]) for p in section.panels]
        drawn = [(panel, matching) for panel, matching in drawn if matching]
        left -= {key for _, matching in drawn for key in matching}
        if drawn:
            found += [f"<h2>{section.title}</h2>", svg(draw(rows, drawn))]
    if left:
        others = [(Panel(key, (key,)), [key]) for key in sorted(left)]
        found += ["<h2>Other metrics</h2>", svg(draw(rows, others))]
    return found or ["<p class=note>no metrics yet</p>"]


def curve(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(pairs seen, value) of a metric, MOST_POINTS at most."""
    points = [
        (row[X_AXIS], row[key])
        for row in rows
        if isinstance(row.get(key), (int, float)) and isinstance(row.get(X_AXIS), (int, float))
    ]
    found = np.array(points, dtype=np.float64).reshape(-1, 2)
    if len(found) > MOST_POINTS:
        found = np.stack([part.mean(axis=0) for part in np.array_split(found, MOST_POINTS)])
    return found[:, 0], found[:, 1]


def draw(rows: Rows, panels: Sequence[tuple[Panel, list[str]]]) -> Figure:
    """Two panels a row."""
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.7 * height), layout="constrained")
    axes = figure.subplots(height, 2, squeeze=False).ravel()
    for axis, (panel, keys) in zip(axes, panels, strict=False):
        for key in keys:
            at, values = curve(rows, key)
            label = key.partition("/")[2]
            axis.plot(at, values, "." if len(at) < 3 else "-", lw=1.2, label=label)
        if panel.logarithmic and all((curve(rows, key)[1] > 0).any() for key in keys):
            axis.set_yscale("log")
        axis.set_title(panel.title + (f", {panel.unit}" if panel.unit else ""), fontsize=10)
        axis.set_xlabel("pairs seen", fontsize=8)
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(keys) > 1:
            axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def svg(figure: Figure) -> str:
    """Inline, without dates or random ids."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pairwright", "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return "<svg" + sink.getvalue().partition("<svg")[2]


def results(run: Path) -> list[str]:
    """The tables of eval/*.json, with intervals where there are some."""
    lines = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            found = json.loads(path.read_text())
            intervals = found.get("intervals", {})
            for key, value in found["metrics"].items():
                low, high = intervals.get(key, (None, None))
                span = "" if low is None else f"{low:.4f} to {high:.4f}"
                task, _, metric = key.removeprefix("eval/").partition("/")
                task += ", ema weights" if found.get("weights") == "ema" else ""
                lines.append(
                    f"<tr><td>{html.escape(task)}<td>{html.escape(metric)}<td class=n>{value:.4f}"
                    f"<td class=n>{span}"
                )
        except (ValueError, KeyError, AttributeError, TypeError):
            lines.append(f"<tr><td>{html.escape(path.name)}<td class=alert>cannot be read<td><td>")
    if not lines:
        return []
    head = "<tr><th>task<th>metric<th class=n>value<th class=n>95 % interval"
    return ["<h2>Results of the last evaluation</h2>", f"<table>{head}{''.join(lines)}</table>"]


def curation(config: DictConfig) -> list[str]:
    """The data card: what each step of the curation read, kept and dropped."""
    shards = OmegaConf.select(config, "data.shards")
    if not isinstance(shards, str):
        return []
    try:
        manifest = read_manifest(shards)
    except (ValueError, OSError):
        return ["<h2>Data</h2>", f"<p class=note>{html.escape(shards)} is not here any more</p>"]
    lines = []
    for step in manifest.get("steps", []):
        reasons = ", ".join(f"{html.escape(r)} {n:,}" for r, n in step["dropped"].items())
        lines.append(
            f"<tr><td>{html.escape(step['name'])}<td class=n>{step['read']:,}"
            f"<td class=n>{step['kept']:,}<td>{reasons}"
        )
    head = "<tr><th>step<th class=n>read<th class=n>kept<th>dropped"
    note = f"<p class=note>{manifest['num_samples']:,} pairs in {html.escape(shards)}</p>"
    return ["<h2>Data</h2>", note, f"<table>{head}{''.join(lines)}</table>"]


def media(run: Path) -> list[str]:
    """The newest picture of each kind: files are SAMPLES-WHAT.png (callbacks/pictures.py)."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in (run / "media").glob("*.png"):
        samples, _, what = path.stem.partition("-")
        if samples.isdigit() and what:
            newest[what] = max(newest.get(what, (-1, path)), (int(samples), path))
    found = []
    for what, (samples, path) in sorted(newest.items()):
        data = base64.b64encode(path.read_bytes()).decode()
        words = f"{html.escape(what.replace('-', ' '))}, after {samples:,} pairs"
        found.append(
            f"<figure><figcaption>{words}</figcaption><img src='data:image/png;base64,{data}'>"
            "</figure>"
        )
    return ["<h2>Pictures</h2>", *found] if found else []


def whole_config(config: DictConfig) -> list[str]:
    """The resolved config, folded."""
    text = html.escape(OmegaConf.to_yaml(config))
    return [
        "<h2>Config</h2>",
        f"<details><summary>config.yaml</summary><pre>{text}</pre></details>",
    ]
