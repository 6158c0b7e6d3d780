"""Why one pair was kept or dropped, step by step, with the facts each step looked at."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from curation.ingest import ROWS
from curation.pool import Facts, Pool
from curation.selection import Selection
from curation.step import Selector


def find(pool: Pool, uid: str) -> tuple[dict[str, Any], Any, int] | None:
    """(ingested row, pool file, row number) of a uid or of the pool's own key, or None."""
    for file in pool.files:
        rows = pq.read_table(pool.place(file) / "rows.parquet")
        mask = pc.or_(pc.equal(rows["uid"], uid), pc.equal(rows["key"], uid))
        where = np.flatnonzero(mask.to_numpy(zero_copy_only=False))
        if len(where):
            return rows.slice(int(where[0]), 1).to_pylist()[0], file, int(where[0])
    return None


def shown(value: Any) -> str:
    """A fact as a person wants to read it: an embedding by its length, text quoted and cut."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and isinstance(value[0], float):
        return f"{len(value)} numbers, norm {np.linalg.norm(value):.3f}"
    if isinstance(value, list) and len(value) > 12:
        return f"{json.dumps(value[:12], default=str)[:-1]}, ... ({len(value)} in all)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 160 else text[:157] + "..."


def explain(
    pool: Pool,
    facts: Mapping[str, Facts],
    selectors: Mapping[str, Selector],
    selection: Selection,
    uid: str,
) -> Table:
    """A table of step, decision and what it looked at. Raises ValueError for an unknown pair."""
    found = find(pool, uid)
    refused = pool.rejected()
    if found is None:
        mask = pc.or_kleene(pc.equal(refused["key"], uid), pc.equal(refused["uid"], uid))
        rows = refused.filter(mask).to_pylist()
        if not rows:
            keys = [key for key in refused["key"].to_pylist() if key]
            near = difflib.get_close_matches(uid, keys, 1)
            hint = f"; is it {near[0]}?" if near else ": give a uid or a key of this pool"
            raise ValueError(f"uid={uid}: no such pair in {pool.root}{hint}")
        table = _table(rows[0]["key"], pool)
        table.add_row("ingest", f"[red]dropped: {rows[0]['reason']}", "never became a row")
        return table
    row, file, number = found
    table = _table(row["uid"], pool)
    table.add_row("ingest", "kept", f"{row['caption']!r}, {row['width']}x{row['height']}")
    rejected = selection.rejected()
    reasons = {
        r["step"]: r["reason"]
        for r in rejected.filter(pc.equal(rejected["uid"], row["uid"])).to_pylist()
    }
    kept = bool(pc.any(pc.equal(selection.plan(["uid"])["uid"], row["uid"])).as_py())
    columns = {column: fact for fact in facts.values() for column in fact.annotator.columns}
    for step in selection.steps[1:]:
        name = step["name"]
        reads = selectors[name].reads if name in selectors else ("uid",)
        seen = {
            column: row[column]
            if column in ROWS.names
            else columns[column].read(file, [column])[column][number].as_py()
            for column in reads
            if column in ROWS.names or column in columns
        }
        text = "; ".join(f"{column} = {shown(value)}" for column, value in seen.items())
        settings = ", ".join(
            f"{k}={v}" for k, v in (step["config"] or {}).items() if not k.startswith("_")
        )
        note = f"{text}\n[dim]{settings}[/]" if settings else text
        reason = reasons.get(name)
        if reason and not (name == "unique_uid" and (kept or len(reasons) > 1)):
            table.add_row(name, f"[red]dropped: {reason}", note)
            return table
        table.add_row(name, "one of several copies kept" if reason else "kept", note)
    where = "in the shards" if kept else "[red]lost: this is a bug"
    table.add_row("pack", where, "")
    return table


def _table(uid: str, pool: Pool) -> Table:
    table = Table(title=f"{uid} of {pool.root.name}", title_justify="left")
    for column in ("step", "decision", "what it looked at, with its settings"):
        table.add_column(column, overflow="fold")
    return table
