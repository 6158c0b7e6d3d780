"""Pack: the plan of a selection -> deterministic WebDataset shards, and what belongs beside them.

A shard is a unit of work: `records_per_shard` records in uid order. The bytes are a function of
pool, config and seed;
not of workers, nor of how often the run was killed. `manifest.json` comes last.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine import Engine, Unit
from curation.ingest import location, read_images
from curation.pool import Pool
from curation.selection import ROWS_PER_GROUP, Selection
from curation.step import fingerprint
from pipeline.shards import (
    CAPTION,
    CAPTIONS,
    ROLES,
    Record,
    read_rows,
    whole_file,
    write_json,
    write_manifest,
    write_shard,
    write_table,
)

log = logging.getLogger(__name__)
MOST_OPEN = 256  # pool files a shard reads from at a time; a process may open about 1,000
PLACES = "places.parquet"  # of each row of the plan: where its image is read


class Pack:
    """records_per_shard: 10,000 is img2dataset's and open_clip's habit; small enough to shuffle by
    shards.
    primary: roles in order of preference for the primary caption (`{uid}.txt`, what every reader
        trains on); the first that a pair has is taken, the pool's own text if none.
    """

    def __init__(self, *, records_per_shard: int = 10_000, primary: Sequence[str] = ("alt",)):
        if records_per_shard < 1:
            raise ValueError(f"records_per_shard {records_per_shard}: must be at least 1")
        unknown = [role for role in primary if role not in ROLES]
        if unknown:
            raise ValueError(f"primary {unknown}: roles are {', '.join(ROLES)}")
        self.records_per_shard = records_per_shard
        self.primary = tuple(primary)

    def fingerprint(self, selection: Selection) -> str:
        """Names the bytes of the shards: the selection and this object's settings."""
        return fingerprint(selection.fingerprint, self.records_per_shard, self.primary)

    def run(
        self, pool: Pool, selection: Selection, out: Path, engine: Engine, *, seed: int
    ) -> dict[str, Any] | None:
        """Write the shards that are missing; returns the manifest, without writing it.

        None: `out` already holds exactly this selection. Another selection in `out` is replaced.
        """
        name = self.fingerprint(selection)
        if finished(out, name):
            log.info("pack: %s is this selection already", out)
            return None
        mark, logs = out / f".pack-{name}", pool.cache / "logs" / f"pack-{name}"
        if not mark.exists():
            remove_dataset(out)
            mark.mkdir(parents=True)
        plan = selection.plan(["file", "row", "num_bytes"])
        shards = -(-plan.num_rows // self.records_per_shard)
        images = place_images(pool, plan, mark, exchange=shards > 1)
        spools = [
            Unit(mark / spool, (pool, selection, file, mark / spool), size)
            for file, (spool, size) in images.spools.items()
        ]
        engine.run("exchange", spool_images, spools, logs, measure="B")
        units = []
        for number, start in enumerate(range(0, plan.num_rows, self.records_per_shard)):
            shard = f"shard-{number:06d}"
            count = min(self.records_per_shard, plan.num_rows - start)
            arguments = (pool, selection, mark, self.primary, out, shard, start, count)
            units.append(Unit(mark / f"{shard}.json", arguments, count))
        engine.run("pack", pack_shard, units, logs)
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
            "pack": name,
            "records_per_shard": self.records_per_shard,
        }

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest; forget the shards' markers and what killed runs left half-written."""
        write_manifest(out, manifest)
        for part in out.glob(".*.part"):
            part.unlink()
        for mark in out.glob(".pack-*"):
            shutil.rmtree(mark)


def finished(out: Path, name: str) -> bool:
    """Whether `out` is a complete dataset of this selection and these settings."""
    path = out / "manifest.json"
    return path.exists() and json.loads(path.read_text()).get("pack") == name


def remove_dataset(out: Path) -> None:
    """Remove an older dataset of ours, manifest first, so that no reader takes the rest for whole.

    Raises ValueError when `out` holds files that are not ours.
    """
    if not out.exists():
        return
    ours = ("manifest.json", "card.json", "report.html", "rejected.parquet")
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


@dataclass(frozen=True)
class ImagePlaces:
    """Where pack finds images. spools: pool file -> (name of its spool, bytes)."""

    spools: dict[str, tuple[str, int]]


def place_images(pool: Pool, plan: pa.Table, mark: Path, *, exchange: bool) -> ImagePlaces:
    """Decide where each image of the plan will be read from, and write that to `mark`, once.

    In a tar any image can be read where it lies. A Parquet file has to be decoded from its start,
    so with several shards each is read once and its kept images are laid out in the plan's order
    (the exchange): a shard then reads one contiguous piece of each spool.
    """
    files = plan["file"].dictionary_encode().combine_chunks()
    names, codes = files.dictionary.to_pylist(), files.indices.to_numpy()
    sizes, offsets = plan["num_bytes"].to_numpy(), plan["row"].to_numpy().copy()
    spools = {}
    for code, name in enumerate(names):
        if not name.endswith(".tar") and exchange:
            mine = codes == code
            ends = np.cumsum(sizes[mine])
            offsets[mine] = ends - sizes[mine]
            spools[name] = (f"{fingerprint(name)}.spool", int(ends[-1]))
    paths = [str(mark / spools[n][0]) if n in spools else str(pool.root / n) for n in names]
    if not (mark / PLACES).exists():
        path = pa.DictionaryArray.from_arrays(files.indices, pa.array(paths, pa.string()))
        table = pa.table({"path": path.cast(pa.string()), "offset": offsets})
        write_table(mark / PLACES, table, rows_per_group=ROWS_PER_GROUP)
    return ImagePlaces(spools)


def spool_images(pool: Pool, selection: Selection, file: str, spool: Path) -> None:
    """The work of one exchange unit: the kept images of a pool file, in the plan's order."""
    plan = selection.plan(["file", "row", "num_bytes"])
    rows = plan.filter(pc.equal(plan["file"], file))
    sizes = rows["num_bytes"].to_numpy()
    rows = rows.append_column("offset", pa.array(np.cumsum(sizes) - sizes)).sort_by("row")
    images = read_images(pool.root / file, rows["row"].to_pylist(), rows["num_bytes"].to_pylist())
    with whole_file(spool) as sink:
        for offset, image in zip(rows["offset"].to_pylist(), images, strict=True):
            sink.seek(offset)  # not os.pwrite: on a full disk that writes a part and says nothing
            sink.write(image)


def is_decoded(path: str) -> bool:
    """Whether an image is not a piece of the file at an offset: Parquet, tables, folders."""
    return not path.endswith((".tar", ".spool"))


def pack_shard(
    pool: Pool,
    selection: Selection,
    mark: Path,
    primary: Sequence[str],
    out: Path,
    name: str,
    start: int,
    count: int,
) -> None:
    """The work of one unit: records [start, start + count) of the plan."""
    part = read_rows(selection.folder / "plan.parquet", start, count)
    places = read_rows(mark / PLACES, start, count)
    records = shard_records(pool, part, places, primary, mark)
    write_json(mark / f"{name}.json", write_shard(out, name, records))


def shard_records(
    pool: Pool, part: pa.Table, places: pa.Table, primary: Sequence[str], spools: Path
) -> Iterator[Record]:
    """The records of a slice of the plan, in its order; memory holds one image at a time.

    spools: a folder for a temporary file of images.
    """
    scores = [f.name for f in part.schema if pa.types.is_floating(f.type)]
    banks = [f.name for f in part.schema if f.type == CAPTIONS]
    paths, offsets = places["path"].to_pylist(), places["offset"].to_pylist()
    files: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        images: Any = None
        if any(is_decoded(path) for path in set(paths)):
            images = stack.enter_context(_decoded(part, paths, offsets, spools))
        for position, row in enumerate(_rows(part)):
            path, offset = paths[position], offsets[position]
            if is_decoded(path):
                image = images(position)
            else:
                if path not in files:
                    if len(files) == MOST_OPEN:
                        files.pop(next(iter(files))).close()
                    files[path] = stack.enter_context(location(path).open("rb"))
                files[path].seek(offset)
                image = files[path].read(row["num_bytes"])
            yield record(pool, row, image, scores, banks, primary)


@contextlib.contextmanager
def _decoded(part: pa.Table, paths: list[str], rows: list[int], spools: Path) -> Iterator[Any]:
    """Images of files decoded by position, when no exchange was worth it: a spool on disk."""
    sizes, where = part["num_bytes"].to_pylist(), {}
    with tempfile.TemporaryFile(dir=spools) as spool:
        for path in sorted({path for path in paths if is_decoded(path)}):
            mine = sorted((rows[i], i) for i, other in enumerate(paths) if other == path)
            images = read_images(location(path), [r for r, _ in mine], [sizes[i] for _, i in mine])
            for (_, position), image in zip(mine, images, strict=True):
                where[position] = (spool.tell(), len(image))
                spool.write(image)
        spool.flush()
        yield lambda position: os.pread(spool.fileno(), where[position][1], where[position][0])


def _rows(part: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as dicts, in batches: a shard's rows at once would be a gigabyte of Python."""
    for batch in part.to_batches(max_chunksize=1024):
        names = batch.schema.names
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield dict(zip(names, values, strict=True))


def record(
    pool: Pool,
    row: dict[str, Any],
    image: bytes,
    scores: list[str],
    banks: list[str],
    primary: Sequence[str],
) -> Record:
    """A plan row and its image as a record of contract 1."""
    info = {key: row[key] for key in ("uid", "width", "height", "sha256")}
    captions = [{"text": row["caption"], "role": "alt", "source": "pool"}]
    for bank in banks:
        captions += row[bank] or []
    for caption in captions:
        caption |= {key: caption.get(key) for key in CAPTION.names}
    info["captions"] = captions
    if row["url"] is not None:
        info["url"] = row["url"]
    info["stats"] = {name: row[name] for name in scores if row[name] is not None}
    if "entries" in row:
        info["entries"] = row["entries"]
    info["provenance"] = {"pool": pool.root.name, "shard": row["file"], "key": row["key"]}
    if len(image) != row["num_bytes"]:
        raise ValueError(f"{row['file']}: the image of {row['key']} changed since it was ingested")
    text = next((c["text"] for role in primary for c in captions if c["role"] == role), None)
    return Record(row["uid"], image, row["extension"], text or row["caption"], info)


def commit() -> str | None:
    """The commit of this source tree, if it is a checkout."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
