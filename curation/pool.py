"""The pool and its facts: ingested rows and annotation columns, each computed once and cached as
Parquet.

Layout of the cache: `ingest-<fingerprint>/<pool file>/{rows,rejected}.parquet, counts.json` and
`<annotator>-<fingerprint>/<pool file>/<first row>.parquet`. A fingerprint names what the content
depends on, so a
changed knob makes a new folder and leaves everything else alone.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine import Unit
from curation.ingest import Ingest, identity, location, pool_files, read_images
from curation.step import Annotator, Columnar, Costly, Operational, fingerprint
from pipeline.shards import read_rows, write_json, write_table

ROWS_PER_UNIT = 1024  # rows of one annotation unit: what a kill can cost
ROWS_PER_GROUP = 8 * ROWS_PER_UNIT  # of the ingested rows: a unit decodes the groups it needs


def file_digest(path: str | Path) -> str:
    """Content digest of a file that a step depends on (an entry list, a checkpoint)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def default_cache(pool: str | Path) -> Path:
    """Beside the pool: <pool>.annotations. Raises ValueError for a pool that is not on a disk."""
    if not isinstance(location(pool), Path):
        raise ValueError(f"pool={pool} is not on a disk: say where its annotations go, cache=DIR")
    path = Path(pool).resolve()
    return path.with_name(path.name + ".annotations")


class Pool:
    """A raw pool with its cache. `ingest_config`: the ingest node's values, part of the
    fingerprint.
    """

    def __init__(
        self, root: str | Path, cache: Path, ingest: Ingest, ingest_config: Mapping[str, Any]
    ):
        self.root, self.cache, self.ingest = location(root), cache, ingest
        self.files = pool_files(root)
        self.fingerprint = fingerprint("ingest", ingest.version, dict(ingest_config))
        self.folder = cache / f"ingest-{self.fingerprint}"

    def place(self, file: Path) -> Path:
        """The folder of a pool file's ingested rows."""
        return self.folder / self.name_of(file)

    def name_of(self, file: Path) -> str:
        """A pool file's name below the root."""
        return str(file.relative_to(self.root))

    def ingest_units(self) -> list[Unit]:
        """One unit a pool file. Raises ValueError for a file that changed since it was ingested."""
        units = []
        for file in self.files:
            marker, now = self.place(file) / "counts.json", identity(file)
            if marker.exists():
                was = json.loads(marker.read_text())["file"]
                if was != now:
                    raise ValueError(
                        f"{file} changed since it was ingested: its annotations would be wrong. "
                        f"Remove the cache {self.cache}, or give another one with cache=DIR"
                    )
            units.append(Unit(marker, (self.ingest, file, marker.parent), now["bytes"]))
        return units

    def counts(self) -> dict[str, Any]:
        """read, kept, dropped by reason, notes: over all pool files. Raises above
        max_bad_fraction.
        """
        read = kept = 0
        dropped, notes = Counter(), Counter()
        for file in self.files:
            counts = json.loads((self.place(file) / "counts.json").read_text())
            read, kept = read + counts["read"], kept + counts["kept"]
            dropped.update(counts["dropped"])
            notes.update(counts["notes"])
        bad = read - kept
        if bad > self.ingest.max_bad_fraction * read:
            raise ValueError(
                f"{bad} of {read} samples of {self.root} cannot be used ({dict(dropped)}): over "
                f"ingest.max_bad_fraction={self.ingest.max_bad_fraction}; raise it if that is right"
            )
        return {"read": read, "kept": kept, "dropped": dict(dropped), "notes": dict(notes)}

    def num_rows(self, file: Path) -> int:
        """Ingested rows of a pool file."""
        return pq.read_metadata(self.place(file) / "rows.parquet").num_rows

    def rejected(self) -> pa.Table:
        """uid, key, reason of what ingest refused."""
        return pa.concat_tables(
            pq.read_table(self.place(f) / "rejected.parquet") for f in self.files
        )


def settings(annotator: Annotator, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config decides the answers: no input files (content counts), no speed."""
    left = {key: value for key, value in config.items() if key not in annotator.inputs}
    for path in annotator.operational if isinstance(annotator, Operational) else ():
        key, _, below = path.partition(".")
        if below and isinstance(left.get(key), Mapping):
            left[key] = {k: v for k, v in left[key].items() if k != below}
        else:
            left.pop(key, None)
    return left


class Facts:
    """One annotator's columns over a pool. `config`: the annotator node's values."""

    def __init__(self, pool: Pool, annotator: Annotator, config: Mapping[str, Any]):
        self.pool, self.annotator = pool, annotator
        self.fingerprint = fingerprint(
            annotator.name,
            annotator.version,
            settings(annotator, config),
            {key: file_digest(path) for key, path in annotator.inputs.items()},
            pool.fingerprint,
        )
        self.folder = pool.cache / f"{annotator.name}-{self.fingerprint}"
        costly = isinstance(annotator, Costly)
        self.rows_per_unit = annotator.rows_per_unit if costly else ROWS_PER_UNIT

    def unit_files(self, file: Path) -> list[tuple[Path, int, int]]:
        """(output, first row, number of rows) of each unit of a pool file."""
        place, rows = self.folder / self.pool.name_of(file), self.pool.num_rows(file)
        step = self.rows_per_unit
        return [
            (place / f"{start:010d}.parquet", start, min(step, rows - start))
            for start in range(0, rows, step)
        ]

    def units(self) -> list[Unit]:
        """Every unit of the pool."""
        return [
            Unit(out, (self, file, out, start, rows), rows)
            for file in self.pool.files
            for out, start, rows in self.unit_files(file)
        ]

    def read(self, file: Path, columns: list[str]) -> pa.Table:
        """The given columns for all ingested rows of a pool file, in row order."""
        tables = [pq.read_table(out, columns=columns) for out, _, _ in self.unit_files(file)]
        schema = pa.schema([(name, self.annotator.columns[name]) for name in columns])
        return pa.concat_tables(tables) if tables else schema.empty_table()


def ingest_file(ingest: Ingest, file: Path, place: Path) -> None:
    """The work of an ingest unit."""
    found = identity(file)
    rows, rejected, counts = ingest.run(file)
    write_table(place / "rows.parquet", rows, rows_per_group=ROWS_PER_GROUP)
    write_table(place / "rejected.parquet", rejected)
    write_json(place / "counts.json", {**counts, "file": found})


def annotate_unit(facts: Facts, file: Path, out: Path, start: int, rows: int) -> None:
    """The work of an annotation unit: rows [start, start + rows) of a pool file."""
    annotator = facts.annotator
    wanted = list(dict.fromkeys(["uid", *annotator.reads]))
    loaded = [*wanted, "row", "num_bytes"] if annotator.needs_images else wanted
    part = read_rows(facts.pool.place(file) / "rows.parquet", start, rows, loaded)
    schema = pa.schema([("uid", pa.string()), *annotator.columns.items()])
    if isinstance(annotator, Columnar) and not annotator.needs_images:
        found = annotator.annotate_table(part)
        answers = [part["uid"], *(found[name].cast(schema.field(name).type) for name in found)]
        names = ["uid", *found]
        write_table(out, pa.Table.from_arrays(answers, names=names).select(schema.names))
        return
    batch = part.select(wanted).to_pylist()
    if annotator.needs_images:
        for sample, image in zip(batch, images_of(file, part), strict=True):
            sample["image"] = image
    journal = out.with_name(f".{out.name}.journal")
    if isinstance(annotator, Costly):
        found = _saved_as_they_come(annotator, batch, journal)
    else:
        found = annotator.annotate(batch)
    assert len(found) == rows, f"{annotator.name}: {len(found)} answers for {rows} samples"
    uids = part["uid"].to_pylist()
    answers = [{"uid": uid, **answer} for uid, answer in zip(uids, found, strict=True)]
    write_table(out, pa.Table.from_pylist(answers, schema=schema))
    journal.unlink(missing_ok=True)


def _saved_as_they_come(
    annotator: Costly, batch: list[dict[str, Any]], journal: Path
) -> list[dict[str, Any]]:
    """The answers for a batch; those in the journal of a killed run are not asked for again."""
    known: dict[str, dict[str, Any]] = {}
    for line in journal.read_bytes().splitlines() if journal.exists() else ():
        with contextlib.suppress(ValueError):  # the line that a kill has torn
            uid, answer = json.loads(line)
            known[uid] = answer
    todo = [sample for sample in batch if sample["uid"] not in known]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with open(journal, "ab") as file:
        file.write(b"\n")  # behind a torn line
        for start in range(0, len(todo), annotator.rows_per_save):
            part = todo[start : start + annotator.rows_per_save]
            for sample, answer in zip(part, annotator.annotate(part), strict=True):
                known[sample["uid"]] = answer
                file.write(json.dumps([sample["uid"], answer]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    return [known[sample["uid"]] for sample in batch]


def images_of(file: Path, part: pa.Table) -> Iterator[bytes]:
    """Image bytes of ingested rows (ascending `row`) of a pool file."""
    return read_images(file, part["row"].to_pylist(), part["num_bytes"].to_pylist())
