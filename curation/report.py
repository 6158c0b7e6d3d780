"""report.html: what curation did, for a person to look at. One file, no network, the same bytes
for the same input.

Counts by step and reason, how often each metadata entry occurs before and after (log axes), the
scores, and a contact
sheet of what each step threw away beside what was kept: a bad rule is seen there first.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from curation.card import entry_counts
from curation.ingest import read_images
from curation.pool import Facts, Pool
from curation.selection import Selection
from curation.step import uniform
from pipeline.data.images import BadImage, decode
from pipeline.shards import write_atomically, write_json

PICTURES = 24  # per contact sheet
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2730 }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { margin-top: 2em; font-size: 1.2em } small, .note { color: #66727f }
table { border-collapse: collapse; width: 100% } td, th { padding: .3em .6em; text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr { border-bottom: 1px solid #e3e8ec }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 10px }
figure { margin: 0; background: #f6f8f9; border-radius: 6px; padding: 6px; text-align: center }
figure img { width: 72px; height: 72px; object-fit: contain } svg { max-width: 100%; height: auto }
figcaption { font-size: 11px; line-height: 1.25; max-height: 5em; overflow: hidden }
figcaption { overflow-wrap: anywhere }
figcaption b { color: #b3541e; font-weight: 600 }
""".strip()


def write_report(
    out: Path,
    manifest: Mapping[str, Any],
    card: Mapping[str, Any],
    pool: Pool,
    selection: Selection,
    facts: Mapping[str, Facts],
) -> None:
    """Write `out/report.html` and, of the same counts, `out/card.json`."""
    plan = selection.plan()
    body = [
        f"<h1>{html.escape(manifest['pool'])}: {manifest['num_samples']:,} of "
        f"{manifest['steps'][0]['read']:,} pairs kept</h1>",
        f"<p class=note>{manifest['num_bytes'] / 1e6:,.1f} MB in {len(manifest['shards'])} shards, "
        f"seed {manifest['seed']}, selection {manifest['selection']}, "
        f"pairwright {manifest['version']}</p>",
        "<h2>Step by step</h2>",
        steps_table(manifest["steps"]),
        *card_section(card),
        *entry_section(pool, facts, plan),
        *score_section(pool, facts, plan),
        "<h2>Captions that occur most</h2>",
        caption_table(pool, plan),
        *sheets(pool, selection, plan),
    ]
    title = html.escape(manifest["pool"])
    page = (
        f"<!doctype html><meta charset=utf-8><title>curation of {title}</title>"
        f"<style>{STYLE}</style>\n" + "\n".join(body) + "\n"
    )
    write_json(out / "card.json", card)
    write_atomically(out / "report.html", page.encode())


def card_section(card: Mapping[str, Any]) -> list[str]:
    """Counts before and after by language, source and entry, a few rows each."""
    found = ["<h2>What is in it</h2>"]
    for name, most in (("language", 20), ("source", 12), ("entries", 20)):
        counts = list(card.get(name, {}).items())
        if not counts:
            continue
        rows = "".join(
            f"<tr><td>{html.escape(value)}<td class=n>{count['pool']:,}<td class=n>"
            f"{count['kept']:,}<td class=n>{100 * count['kept'] / max(count['pool'], 1):.0f} %"
            for value, count in counts[:most]
        )
        note = f"<p class=note>{len(counts) - most:,} more in card.json</p>"
        found.append(
            f"<table><tr><th>{name}<th class=n>pool<th class=n>kept<th class=n>share{rows}</table>"
            + (note if len(counts) > most else "")
        )
    if "text_in_images" in card:
        rows = "".join(
            f"<tr><td>{rate.replace('_', ' ')}<td class=n>{100 * share['pool']:.2f} %"
            f"<td class=n>{100 * share['kept']:.2f} %"
            for rate, share in card["text_in_images"].items()
            if rate != "pairs"
        )
        found.append(f"<table><tr><th>text in images<th class=n>pool<th class=n>kept{rows}</table>")
    return found


def svg(figure: Figure) -> str:
    """A figure as an inline SVG without dates or random ids."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pairwright", "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return "<svg" + sink.getvalue().partition("<svg")[2]


def steps_table(steps: Sequence[Mapping[str, Any]]) -> str:
    """Read, kept, dropped by reason, with a bar of what is left of the pool."""
    total = max(steps[0]["read"], 1)
    rows = []
    for step in steps:
        reasons = ", ".join(
            f"{html.escape(reason)} <b>{count:,}</b>" for reason, count in step["dropped"].items()
        )
        notes = ", ".join(f"{name} {count:,}" for name, count in step.get("notes", {}).items())
        width = 100 * step["kept"] / total
        rows.append(
            f"<tr><td>{html.escape(step['name'])}<td class=n>{step['read']:,}"
            f"<td class=n>{step['kept']:,}<td style='width:180px'><div style='background:#2f7ea8;"
            f"height:10px;width:{width:.1f}%'></div><td>{reasons} <small>{notes}</small>"
        )
    head = "<tr><th>step<th class=n>read<th class=n>kept<th>left of the pool<th>dropped"
    return f"<table>{head}{''.join(rows)}</table>"


def entry_section(pool: Pool, facts: Mapping[str, Facts], plan: pa.Table) -> list[str]:
    """Entry counts before and after on log axes; nothing without an `entries` column."""
    provider = next((f for f in facts.values() if "entries" in f.annotator.columns), None)
    if provider is None:
        return []
    before = entry_counts([provider.read(file, ["entries"])["entries"] for file in pool.files])
    kept = entry_counts([plan["entries"]])
    after = np.pad(kept, (0, len(before) - len(kept)))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for counts, label, colour in (
        (before, "pool", "#9aa7b2"),
        (after, "kept", "#2f7ea8"),
    ):
        ordered = np.sort(counts[counts > 0])[::-1]
        left.loglog(np.arange(1, len(ordered) + 1), ordered, label=label, color=colour)
    left.set(xlabel="entry, by rank", ylabel="pairs that match it", title="head and tail")
    left.legend()
    seen = before > 0
    right.loglog(before[seen], np.maximum(after[seen], 0.5), ".", color="#2f7ea8", alpha=0.3)
    right.loglog([1, before.max()], [1, before.max()], color="#9aa7b2", lw=1)
    right.set(xlabel="pairs before", ylabel="pairs after (0 drawn at 0.5)", title="each entry")
    lost = int((seen & (after == 0)).sum())
    return [
        "<h2>Metadata entries</h2>",
        f"<p class=note>{int(seen.sum()):,} entries occur in the pool, {lost:,} of them no more "
        "among what was kept</p>",
        svg(figure),
    ]


def score_section(pool: Pool, facts: Mapping[str, Facts], plan: pa.Table) -> list[str]:
    """Histograms of every scalar score, pool against kept."""
    columns = [
        (fact, name)
        for fact in facts.values()
        for name, kind in fact.annotator.columns.items()
        if pa.types.is_floating(kind) and name in plan.column_names
    ]
    if not columns:
        return []
    figure = Figure(figsize=(9, 2.8 * len(columns)), layout="constrained")
    axes = figure.subplots(len(columns), squeeze=False)[:, 0]
    for axis, (fact, name) in zip(axes, columns, strict=True):
        pieces = [fact.read(file, [name])[name].to_numpy() for file in pool.files]
        before = np.concatenate(pieces).astype(np.float64)
        before = before[np.isfinite(before)]
        after = plan[name].to_numpy().astype(np.float64)
        bins = np.histogram_bin_edges(before, 60)
        axis.hist(before, bins, color="#c3ccd4", label="pool")
        axis.hist(after[np.isfinite(after)], bins, color="#2f7ea8", label="kept")
        axis.set(title=name, ylabel="pairs")
        axis.legend()
    return ["<h2>Scores</h2>", svg(figure)]


def caption_table(pool: Pool, plan: pa.Table, most: int = 15) -> str:
    """The captions that occur most often in the pool, and how often they were kept."""
    tables = [
        pq.read_table(pool.place(file) / "rows.parquet", columns=["caption"]) for file in pool.files
    ]
    before = pa.concat_tables(tables)["caption"].value_counts()
    order = sorted(
        zip(before.field("values").to_pylist(), before.field("counts").to_pylist(), strict=True),
        key=lambda pair: (-pair[1], pair[0]),
    )[:most]
    after = dict(
        zip(
            *(column.to_pylist() for column in plan["caption"].value_counts().flatten()),
            strict=True,
        )
    )
    rows = "".join(
        f"<tr><td>{html.escape(caption[:120])}<td class=n>{count:,}<td class=n>"
        f"{after.get(caption, 0):,}"
        for caption, count in order
    )
    return f"<table><tr><th>caption<th class=n>pool<th class=n>kept{rows}</table>"


def sheets(pool: Pool, selection: Selection, plan: pa.Table) -> list[str]:
    """A contact sheet of what was kept, then one per step of what it threw away."""
    rejected = selection.rejected().filter(pc.is_valid(selection.rejected()["uid"]))
    groups: dict[str, dict[str, str]] = {"kept": _sample(plan["uid"].to_pylist(), {})}
    for step in selection.steps:
        rows = rejected.filter(pc.equal(rejected["step"], step["name"]))
        reasons = dict(zip(rows["uid"].to_pylist(), rows["reason"].to_pylist(), strict=True))
        groups[step["name"]] = _sample(list(reasons), reasons)
    wanted = {uid for group in groups.values() for uid in group}
    pictures = _pictures(pool, wanted)
    found = []
    for name, group in groups.items():
        if not group:
            continue
        title = "Kept" if name == "kept" else f"Thrown away by {html.escape(name)}"
        cells = "".join(_figure(*pictures[uid], reason) for uid, reason in group.items())
        found += [f"<h2>{title}</h2>", f"<div class=sheet>{cells}</div>"]
    return found


def _sample(uids: list[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """A few uids, drawn by their hash: uid -> reason."""
    distinct = sorted(set(uids))
    order = np.argsort(uniform(0, "report", distinct), kind="stable")[:PICTURES]
    return {distinct[i]: reasons.get(distinct[i], "") for i in order}


def _pictures(pool: Pool, wanted: set[str]) -> dict[str, tuple[str, str]]:
    """uid -> (thumbnail as a data address, caption)."""
    found = {}
    values = pa.array(sorted(wanted), pa.string())
    for file in pool.files:
        rows = pq.read_table(
            pool.place(file) / "rows.parquet", columns=["uid", "caption", "row", "num_bytes"]
        )
        rows = rows.filter(pc.is_in(rows["uid"], values)).sort_by("row")
        images = read_images(file, rows["row"].to_pylist(), rows["num_bytes"].to_pylist())
        for row, image in zip(rows.to_pylist(), images, strict=True):
            found[row["uid"]] = (_thumbnail(image), row["caption"])
    return found


def _thumbnail(data: bytes) -> str:
    try:
        image = decode(data)
    except BadImage:
        return ""
    image.thumbnail((72, 72))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def _figure(picture: str, caption: str, reason: str) -> str:
    text = html.escape(caption if len(caption) < 90 else caption[:90] + "...")
    tag = f"<b>{html.escape(reason)}</b> " if reason else ""
    return f"<figure><img src='{picture}' alt=''><figcaption>{tag}{text}</figcaption></figure>"
