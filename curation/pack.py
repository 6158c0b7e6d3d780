"""Pack: the plan of a selection -> deterministic WebDataset shards, and what belongs beside them.

A shard is a unit of work: `records_per_shard` records in uid order. The bytes are a function of
pool, config and seed;
not of workers, nor of how often the run was killed. `manifest.json` comes last.
"""

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation.engine import LocalEngine, Unit
from curation.ingest import read_images
from curation.pool import Pool
from curation.selection import Selection
from pipeline.shards import Record, write_json, write_manifest, write_shard, write_table

log = logging.getLogger(__name__)


class Pack:
    """records_per_shard: 10,000 is img2dataset's and open_clip's habit; small enough to shuffle by
    shards.
    """

    def __init__(self, *, records_per_shard: int = 10_000):
        if records_per_shard < 1:
            raise ValueError(f"records_per_shard {records_per_shard}: must be at least 1")
        self.records_per_shard = records_per_shard

    def run(
        self, pool: Pool, selection: Selection, out: Path, engine: LocalEngine, *, seed: int
    ) -> dict[str, Any] | None:
        """Write the shards that are missing; returns the manifest, without writing it.

        None: `out` already holds exactly this selection. Another selection in `out` is replaced.
        """
        mark = out / f".pack-{selection.fingerprint}-{self.records_per_shard}"
        if finished(out, selection, self.records_per_shard):
            log.info("pack: %s is this selection already", out)
            return None
        if not mark.exists():
            remove_dataset(out)
            mark.mkdir(parents=True)
        plan = selection.plan(["uid"])
        units = []
        for number, start in enumerate(range(0, plan.num_rows, self.records_per_shard)):
            name = f"shard-{number:06d}"
            count = min(self.records_per_shard, plan.num_rows - start)
            arguments = (pool, selection, out, name, start, count, mark / f"{name}.json")
            units.append(Unit(mark / f"{name}.json", arguments, count))
        engine.run("pack", pack_shard, units, pool.cache / "logs" / mark.name[1:])
        shards = [json.loads(unit.marker.read_text()) for unit in units]
        write_table(out / "rejected.parquet", selection.rejected())
        return {
            "num_samples": sum(shard["num_samples"] for shard in shards),
            "num_bytes": sum(shard["num_bytes"] for shard in shards),
            "shards": shards,
            "steps": selection.steps,
            "seed": seed,
            "pool": pool.root.name,
            "version": version("pairwright"),
            "created_by_commit": commit(),
            "selection": selection.fingerprint,
            "records_per_shard": self.records_per_shard,
        }

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest; forget the shards' markers and what killed runs left half-written."""
        write_manifest(out, manifest)
        for part in out.glob(".*.part"):
            part.unlink()
        for mark in out.glob(".pack-*"):
            shutil.rmtree(mark)


def finished(out: Path, selection: Selection, records_per_shard: int) -> bool:
    """Whether `out` is a complete dataset of this selection."""
    path = out / "manifest.json"
    if not path.exists():
        return False
    manifest = json.loads(path.read_text())
    wanted = (selection.fingerprint, records_per_shard)
    return (manifest.get("selection"), manifest.get("records_per_shard")) == wanted


def remove_dataset(out: Path) -> None:
    """Remove an older dataset of ours, manifest first, so that no reader takes the rest for whole.

    Raises ValueError when `out` holds files that are not ours.
    """
    if not out.exists():
        return
    ours = ("manifest.json", "report.html", "rejected.parquet")
    foreign = [
        path.name
        for path in out.iterdir()
        if path.name not in ours and not path.name.startswith(("shard-", ".shard-", ".pack-"))
    ]
    if foreign:
        names = ", ".join(sorted(foreign)[:5])
        raise ValueError(f"out={out} holds other files ({names}): give a new folder")
    if (out / "manifest.json").exists():
        log.warning("%s holds another selection: it is replaced", out)
        (out / "manifest.json").unlink()
    shutil.rmtree(out)


def pack_shard(
    pool: Pool, selection: Selection, out: Path, name: str, start: int, count: int, marker: Path
) -> None:
    """The work of one unit: records [start, start + count) of the plan."""
    part = selection.plan().slice(start, count)
    write_json(marker, write_shard(out, name, shard_records(pool, part)))


def shard_records(pool: Pool, part: pa.Table) -> Iterator[Record]:
    """The records of a slice of the plan, in its order.

    Images are copied from the pool file by file into a spool on disk, so memory holds one at a
    time.
    """
    part = part.append_column("position", pa.array(range(part.num_rows), pa.int64()))
    scores = [n for n in part.column_names if pa.types.is_floating(part.schema.field(n).type)]
    with tempfile.TemporaryFile() as spool:
        where: dict[int, tuple[int, int]] = {}
        for name in sorted(set(part["file"].to_pylist())):
            rows = part.filter(pc.equal(part["file"], name)).sort_by("row")
            images = read_images(
                pool.root / name, rows["row"].to_pylist(), rows["num_bytes"].to_pylist()
            )
            for position, image in zip(rows["position"].to_pylist(), images, strict=True):
                where[position] = (spool.tell(), len(image))
                spool.write(image)
        for row in part.to_pylist():
            start, size = where[row["position"]]
            spool.seek(start)
            yield record(pool, row, spool.read(size), scores)


def record(pool: Pool, row: dict[str, Any], image: bytes, scores: list[str]) -> Record:
    """A plan row and its image as a record of contract 1."""
    info = {key: row[key] for key in ("uid", "width", "height", "sha256")}
    info["captions"] = [
        {"text": row["caption"], "role": "alt", "source": "pool", "lang": None, "score": None}
    ]
    if row["url"] is not None:
        info["url"] = row["url"]
    info["stats"] = {name: row[name] for name in scores if row[name] is not None}
    if "entries" in row:
        info["entries"] = row["entries"]
    info["provenance"] = {"pool": pool.root.name, "shard": row["file"], "key": row["key"]}
    assert len(image) == row["num_bytes"], f"{row['key']}: image changed under us"
    return Record(row["uid"], image, row["extension"], row["caption"], info)


def commit() -> str | None:
    """The commit of this source tree, if it is a checkout."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
