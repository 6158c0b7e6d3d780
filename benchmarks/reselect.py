"""How long does a changed threshold take when all annotations are cached?

    python benchmarks/reselect.py --pool POOL --run RUN --work DIR --output FILE.md

Annotates the pool once (hashes, entries, embed with the checkpoint RUN), then changes one threshold
after the other and selects again, as `python -m curation.run only=select` does: in this process,
and once as the command that a user types, with the start of Python and its imports.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curation.run import run
from pipeline.check import composed

ROOT = Path(__file__).resolve().parents[1]
ANNOTATORS = ("hashes", "entries", "embed")
SELECTORS = ("caption_frequency", "clip_score", "duplicates", "balance")
CHANGES = (
    "select.balance.max_pairs_per_entry=200",
    "select.balance.max_pairs_per_entry=50",
    "select.clip_score.fraction=0.5",
    "select.caption_frequency.max_pairs_per_caption=3",
    "select.duplicates.columns=[phash]",
)


def words(pool: str, limit: int) -> list[str]:
    """The most frequent words of a pool's captions: an entry list for this measurement."""
    counts: Counter[str] = Counter()
    for file in sorted(Path(pool).glob("*.parquet")):
        for caption in pq.read_table(file, columns=["caption"])["caption"].to_pylist():
            counts.update(set(re.findall(r"[a-z]{2,}", (caption or "").lower())))
    return [word for word, _ in counts.most_common(limit)]


def cpu_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pool", required=True)
    parser.add_argument("--run", required=True, help="a run directory: the proxy")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the cache")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    entries = options.work / "entries.json"
    if not entries.exists():
        entries.write_text(json.dumps(words(options.pool, 10_000)))
    given = [f"pool={options.pool}", "out=null", f"cache={options.work}/cache"]
    given += [f"+annotate@annotate.{name}={name}" for name in ANNOTATORS]
    given += [f"+select@select.{name}={name}" for name in SELECTORS]
    given += [f"order=[{','.join(SELECTORS)}]", f"annotate.embed.run={options.run}"]
    given += [f"annotate.entries.entries={entries}", "annotate.entries.lower_case=true"]
    given += ["select.balance.tail_fraction=null", "select.balance.max_pairs_per_entry=100"]
    run(composed("curate", [*given, "only=annotate"]))
    rows, changed = [], []
    for change in ("nothing decided before", *CHANGES):
        if change in CHANGES:
            changed = [c for c in changed if c.split("=")[0] != change.split("=")[0]] + [change]
        for folder in (options.work / "cache").glob("select-*"):
            (folder / "steps.json").unlink(missing_ok=True)  # an earlier benchmark's decisions
        cpu, wall = cpu_seconds(), time.perf_counter()
        selection = run(composed("curate", [*given, *changed, "only=select"]))
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        rows.append((change, selection.steps[-1]["kept"], cpu, wall))
    command = [sys.executable, "-m", "curation.run", *given, *changed, "only=select", "seed=1"]
    children, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    wall, used = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - children.ru_utime - children.ru_stime
    rows.append(("seed=1, as a command with its start", selection.steps[-1]["kept"], cpu, wall))
    lines = [
        "# A changed threshold, annotations cached",
        "",
        f"{selection.steps[0]['read']:,} pairs; annotators {', '.join(ANNOTATORS)}; selectors "
        f"{', '.join(SELECTORS)}. 2026-11-23, 2 cores of a shared x86-64 server, load "
        f"{os.getloadavg()[0]:.0f}. Python {platform.python_version()}, pyarrow "
        f"{version('pyarrow')}.",
        "",
        "Command: `python benchmarks/reselect.py --pool POOL --run RUN --work DIR`",
        "",
        "| changed | pairs kept | CPU seconds | wall seconds |",
        "|---|---|---|---|",
        *(f"| `{what}` | {kept:,} | {cpu:.2f} | {wall:.2f} |" for what, kept, cpu, wall in rows),
        "",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
