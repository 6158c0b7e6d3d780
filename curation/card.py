"""The data card of a dataset: what the pool held and what was kept, by language, source and entry.

`card.json` lies beside the shards for programs; report.html shows the same to people.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.pool import Facts, Pool
from curation.select.parrot import co_embedded_text_rates, legible
from curation.selection import Selection

MOST = 50  # rows of a table in the card
Counts = dict[str, dict[str, float]]


def host(url: str | None) -> str:
    """The host of a URL; what a source is called when there is none."""
    return (urlsplit(url).hostname or "unknown") if url else "no url"


def before_after(before: Iterable[Any], after: Iterable[Any], most: int = MOST) -> Counts:
    """{value: {pool, kept}} of the most frequent values, and the rest under "other values"."""
    pool, kept = Counter(map(str, before)), Counter(map(str, after))
    order = sorted(pool, key=lambda value: (-pool[value], value))
    counts = {v: {"pool": pool[v], "kept": kept[v]} for v in order[:most]}
    if rest := order[most:]:
        counts["other values"] = {
            "pool": sum(pool[v] for v in rest),
            "kept": sum(kept[v] for v in rest),
        }
    return counts


def entry_counts(columns: Iterable[pa.ChunkedArray]) -> np.ndarray:
    """Occurrences of each entry id over list columns."""
    ids = [pc.list_flatten(column).to_numpy(zero_copy_only=False) for column in columns]
    flat = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int64)
    return np.bincount(flat)


def _names(fact: Facts) -> list[str] | None:
    path = fact.annotator.inputs.get("entries")
    if path is None:
        return None
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content["entries"] if isinstance(content, dict) else content


def data_card(
    manifest: Mapping[str, Any], pool: Pool, facts: Mapping[str, Facts], selection: Selection
) -> dict[str, Any]:
    """{pool, read, kept, dropped: {step: {reason: n}}, source, language?, entries?}; each of the
    last three is {value: {pool, kept}}.
    """
    plan = selection.plan()
    rows = pa.concat_tables(
        pq.read_table(pool.place(f) / "rows.parquet", columns=["uid", "url"]) for f in pool.files
    )
    card: dict[str, Any] = {
        "pool": manifest["pool"],
        "read": manifest["steps"][0]["read"],
        "kept": manifest["num_samples"],
        "dropped": {s["name"]: s["dropped"] for s in manifest["steps"] if s["dropped"]},
        "source": before_after(
            map(host, rows["url"].to_pylist()), map(host, plan["url"].to_pylist())
        ),
    }
    provider = {column: fact for fact in facts.values() for column in fact.annotator.columns}
    if "language" in provider:
        read = [provider["language"].read(file, ["language"]) for file in pool.files]
        languages = pa.concat_tables(read)["language"]
        kept = pc.is_in(rows["uid"], plan["uid"].combine_chunks())
        after = languages.filter(kept).to_pylist()
        card["language"] = before_after(languages.to_pylist(), after)
    if "entries" in provider and "entries" in plan.column_names:
        fact = provider["entries"]
        before = entry_counts(fact.read(file, ["entries"])["entries"] for file in pool.files)
        after = np.pad(entry_counts([plan["entries"]]), (0, len(before)))
        names, order = _names(fact), np.argsort(-before, kind="stable")[:MOST]
        card["entries"] = {
            names[i] if names else str(i): {"pool": int(before[i]), "kept": int(after[i])}
            for i in order
            if before[i]
        }
    if "spotted_text" in provider:
        card["text_in_images"] = text_rates(pool, provider["spotted_text"], plan)
    return card


def text_rates(pool: Pool, spotting: Facts, plan: pa.Table) -> Counts:
    """{rate: {pool, kept}}: how much the captions spell what the images show (parrot captions)."""
    wanted = plan["uid"].combine_chunks()
    pairs: dict[str, list[tuple[str, list[str]]]] = {"pool": [], "kept": []}
    for file in pool.files:
        rows = pq.read_table(pool.place(file) / "rows.parquet", columns=["uid", "caption"])
        spotted = spotting.read(file, ["spotted_text"])["spotted_text"].to_pylist()
        found = list(zip(rows["caption"].to_pylist(), map(legible, spotted), strict=True))
        kept = pc.is_in(rows["uid"], wanted).to_pylist()
        pairs["pool"] += found
        pairs["kept"] += [pair for pair, keep in zip(found, kept, strict=True) if keep]
    rates = {name: co_embedded_text_rates(these) for name, these in pairs.items()}
    return {
        rate: {name: round(float(rates[name][rate]), 6) for name in rates} for rate in rates["pool"]
    }
