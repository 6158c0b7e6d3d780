"""Selection: the selectors in order over narrow columns, with a reason for every drop.

The result is a plan (the kept rows, by uid, with where their image is and what goes into the
shard) and the table of
rejections. It costs seconds and is remade whenever a threshold changes; no annotation is.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from curation.ingest import ROWS
from curation.pool import Facts, Pool, file_digest
from curation.step import ReadsFiles, Scoring, Selector, fingerprint
from pipeline.shards import CAPTIONS, write_json, write_table

log = logging.getLogger(__name__)
REJECTIONS = pa.schema([("uid", pa.string()), ("step", pa.string()), ("reason", pa.string())])
ROWS_PER_GROUP = 10_000  # of the plan: a shard reads the groups it needs


@dataclass(frozen=True)
class Selection:
    """What selection left behind: `plan.parquet`, `rejected.parquet`, `steps.json` in `folder`."""

    folder: Path
    fingerprint: str

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The manifest's entries of ingest and every selector."""
        return json.loads((self.folder / "steps.json").read_text())

    def plan(self, columns: list[str] | None = None) -> pa.Table:
        """Kept rows, sorted by uid."""
        return pq.read_table(self.folder / "plan.parquet", columns=columns)

    def rejected(self) -> pa.Table:
        """uid, step, reason of everything that was read and not kept."""
        return pq.read_table(self.folder / "rejected.parquet")


def select(
    pool: Pool,
    facts: Mapping[str, Facts],
    selectors: Mapping[str, Selector],
    configs: Mapping[str, Any],
    *,
    seed: int,
) -> Selection:
    """Apply `selectors` in their order to everything ingested; a finished selection is found again.

    configs: each selector's node values, for its fingerprint. Raises ValueError when nothing is
    kept or a selector
    needs a column that no annotator provides.
    """
    names = fingerprint(
        pool.fingerprint,
        [pool.name_of(file) for file in pool.files],
        {name: fact.fingerprint for name, fact in facts.items()},
        [(name, *_identity(s, configs[name])) for name, s in selectors.items()],
        seed,
    )
    selection = Selection(pool.cache / f"select-{names}", names)
    if (selection.folder / "steps.json").exists():
        log.info("select: nothing to do, %s is there", selection.folder.name)
        return selection
    counts = pool.counts()
    steps = [{"name": "ingest", "config": {}, "fingerprint": pool.fingerprint, **counts}]
    refused = pool.rejected()
    rejections = [
        pa.table(
            {
                "uid": refused["uid"],
                "step": pa.array(["ingest"] * refused.num_rows, pa.string()),
                "reason": refused["reason"],
            },
            schema=REJECTIONS,
        )
    ]
    parts = _parts(pool, facts, selectors)
    parts = _apply("unique_uid", parts, _repeated_uids(parts), {}, steps, rejections)
    if not steps[-1]["kept"]:
        raise ValueError(_nothing_left(steps))
    for name, selector in tqdm(selectors.items(), desc="select", unit="step"):
        wanted = ["uid", *selector.reads]
        measures = [selector.measure(part.select(wanted)) for part in parts]
        combined = selector.combine(measures)
        reasons = [selector.apply(part.select(wanted), combined, seed) for part in parts]
        if isinstance(selector, Scoring):
            parts = [_scored(part, wanted, selector, combined, seed) for part in parts]
        parts = _apply(name, parts, reasons, configs[name], steps, rejections)
        if not steps[-1]["kept"]:
            raise ValueError(_nothing_left(steps))
    plan = _plan(pa.concat_tables(parts))
    selection.folder.mkdir(parents=True, exist_ok=True)
    write_table(selection.folder / "plan.parquet", plan, rows_per_group=ROWS_PER_GROUP)
    write_table(selection.folder / "rejected.parquet", pa.concat_tables(rejections).sort_by("uid"))
    write_json(selection.folder / "steps.json", steps)
    return selection


def _identity(selector: Selector, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a selector's decisions depend on: version, settings, content of the files it reads."""
    inputs = selector.inputs if isinstance(selector, ReadsFiles) else {}
    settings = {key: value for key, value in config.items() if key not in inputs}
    return selector.version, settings, {key: file_digest(path) for key, path in inputs.items()}


def _providers(facts: Mapping[str, Facts], selectors: Mapping[str, Selector]) -> dict[str, str]:
    """Which node makes a column. Raises ValueError when two do."""
    made = {f"annotate.{name}": fact.annotator.columns for name, fact in facts.items()}
    made |= {f"select.{name}": s.columns for name, s in selectors.items() if isinstance(s, Scoring)}
    found: dict[str, str] = dict.fromkeys(ROWS.names, "ingest")
    for node, columns in made.items():
        for column in columns:
            if column in found:
                raise ValueError(f"{node} and {found[column]} both make the column {column!r}")
            found[column] = node
    return found


def travels(column: str, kind: pa.DataType) -> bool:
    """Whether a fact goes into the shards: scores, caption banks, and the matched entries."""
    return pa.types.is_floating(kind) or kind == CAPTIONS or column == "entries"


def _wanted(facts: Mapping[str, Facts], selectors: Mapping[str, Selector]) -> dict[str, list[str]]:
    """The columns to load of each annotator: those that travel and those that selectors read.

    Raises ValueError for a selector that reads what nobody makes before it.
    """
    providers = _providers(facts, selectors)
    wanted = {
        column
        for fact in facts.values()
        for column, kind in fact.annotator.columns.items()
        if travels(column, kind)
    }
    later = {f"select.{name}" for name in selectors}
    for name, selector in selectors.items():
        for column in selector.reads:
            if column not in providers or providers[column] in later:
                there = sorted(c for c, node in providers.items() if node not in later)
                raise ValueError(
                    f"select.{name} needs the column {column!r}, which nothing makes before it "
                    f"(there are: {', '.join(there)}): add the annotator, or take {name} out of "
                    "order"
                )
            wanted.add(column)
        later.discard(f"select.{name}")
    return {
        name: [c for c in fact.annotator.columns if c in wanted] for name, fact in facts.items()
    }


def _parts(
    pool: Pool, facts: Mapping[str, Facts], selectors: Mapping[str, Selector]
) -> list[pa.Table]:
    wanted = _wanted(facts, selectors)
    parts = []
    for file in pool.files:
        part = pq.read_table(pool.place(file) / "rows.parquet")
        place = [pool.name_of(file)] * part.num_rows
        part = part.append_column("file", pa.array(place, pa.string()))
        for name, columns in wanted.items():
            if columns:
                table = facts[name].read(file, columns)
                for column in columns:
                    part = part.append_column(column, table[column])
        parts.append(part.combine_chunks())
    return parts


def _scored(
    part: pa.Table, wanted: list[str], selector: Scoring, combined: Any, seed: int
) -> pa.Table:
    """The part with a scoring selector's columns."""
    scores = selector.score(part.select(wanted), combined, seed)
    for column, kind in selector.columns.items():
        part = part.append_column(column, scores[column].cast(kind))
    return part


def _repeated_uids(parts: list[pa.Table]) -> list[pa.Array]:
    """A uid names a file in the shards, so a pair that the pool holds twice is kept once: the
    first.
    """
    uids = np.array([uid for part in parts for uid in part["uid"].to_pylist()])
    _, first = np.unique(uids, return_index=True)
    repeated = np.ones(len(uids), bool)
    repeated[first] = False
    reasons, start = [], 0
    for part in parts:
        mask = repeated[start : start + part.num_rows]
        reasons.append(pa.array(["same_pair" if bad else None for bad in mask], pa.string()))
        start += part.num_rows
    return reasons


def _apply(
    name: str,
    parts: list[pa.Table],
    reasons: list[pa.Array],
    config: Any,
    steps: list[dict[str, Any]],
    rejections: list[pa.Table],
) -> list[pa.Table]:
    """Book the reasons of one step and return what it kept."""
    kept, dropped = [], Counter()
    for part, reason in zip(parts, reasons, strict=True):
        assert len(reason) == part.num_rows, f"{name}: a reason or null for every row"
        keep = pc.is_null(reason)
        out = pc.invert(keep)
        words = reason.filter(out)
        dropped.update(words.to_pylist())
        table = {"uid": part["uid"].filter(out), "reason": words}
        table["step"] = pa.array([name] * len(words), pa.string())
        rejections.append(pa.table(table).select(REJECTIONS.names).cast(REJECTIONS))
        kept.append(part.filter(keep))
    steps.append(
        {
            "name": name,
            "config": config,
            "fingerprint": fingerprint(name, config, steps[-1]["fingerprint"]),
            "read": sum(part.num_rows for part in parts),
            "kept": sum(part.num_rows for part in kept),
            "dropped": dict(sorted(dropped.items())),
        }
    )
    return kept


def _plan(plan: pa.Table) -> pa.Table:
    """Sorted by uid: content hashes, so neighbours in a shard are unrelated, whatever the pool's
    order.
    """
    facts = [f.name for f in plan.schema if travels(f.name, f.type)]
    return plan.select([*ROWS.names, "file", *facts]).sort_by("uid")


def _nothing_left(steps: list[dict[str, Any]]) -> str:
    lines = [
        f"  {s['name']}: read {s['read']}, kept {s['kept']}, dropped {s['dropped']}" for s in steps
    ]
    worst = max(steps, key=lambda step: (step["read"] > 0) * (step["read"] - step["kept"]))
    return (
        "the selection keeps nothing; no shards are written:\n" + "\n".join(lines) + "\n"
        f"most went in {worst['name']}: loosen select.{worst['name']} or take it out of order"
    )
