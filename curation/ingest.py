"""Ingest: give each pair of a raw pool a content id, check that it can be used, count what cannot.

Layouts: Parquet with image bytes (Hugging Face's `image: {bytes, path}` beside a caption column),
tars of img2dataset,
DataComp or our own (`key.jpg|png|webp`, `key.txt` and/or `key.json`). Image bytes stay where they
are: a row of the
result tells where to find them. Where a pool has neither: pictures beside .txt files or under a
metadata table (curation/loose.py). One pool file -> one Parquet file of rows + the counts of what
was read and rejected.
"""

import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from curation.loose import (
    is_loose,
    loose_files,
    loose_identity,
    loose_images,
    read_picture,
    rows_of,
)
from pipeline.data.images import FORMATS, BadImage, open_image, to_rgb
from pipeline.shards import BLOCK, content_uid

ROWS = pa.schema(
    [
        ("uid", pa.string()),
        ("caption", pa.string()),
        ("extension", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("url", pa.string()),
        ("key", pa.string()),  # the pool's own key: provenance only, never an identity
        ("row", pa.int64()),  # Parquet: row number; tar: byte offset of the image
    ]
)
log = logging.getLogger(__name__)
SAFE_UID = re.compile(r"[0-9A-Za-z_-]{1,64}")  # a uid becomes a file name
REJECTED = pa.schema([("uid", pa.string()), ("key", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class RawSample:
    """A pair as the pool holds it. `problem`: why it could not even be read (then image may be
    None).
    """

    key: str
    row: int
    image: bytes | None
    caption: str | bytes | None
    url: str | None = None
    uid: str | None = None
    problem: str | None = None


def location(name: str | Path) -> Path:
    """A local path, or with :// in it whatever fsspec reads (s3://bucket/pool), seen as a path."""
    return UPath(name) if "://" in str(name) else Path(name)


def identity(file: Path) -> dict[str, Any]:
    """What changes when a pool file does: its size and its time, or the store's own tag of it."""
    if isinstance(file, Path):
        if is_loose(file):
            return loose_identity(file)
        stat = file.stat()
        return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    info = file.fs.info(file.path)
    known = (info.get(k) for k in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"))
    return {"bytes": info["size"], "tag": str(next(filter(None, known), ""))}


def pool_files(pool: str | Path) -> list[Path]:
    """The pool's data files, sorted. Raises ValueError when there are none."""
    root = location(pool)
    files = sorted(p for p in root.rglob("*.tar") if p.is_file())
    # img2dataset writes a Parquet file of metadata beside each tar: those hold no images
    files += sorted(p for p in root.rglob("*.parquet") if not p.with_suffix(".tar").exists())
    files = [f for f in files if not f.name.startswith(".") and f.name != "rejected.parquet"]
    if not files and isinstance(root, Path):
        files = loose_files(root)
    if not files:
        raise ValueError(
            f"pool={pool}: no *.parquet with image bytes, no *.tar and no pictures below it "
            "(layouts: Hugging Face Parquet, img2dataset, DataComp, our own shards; pictures "
            "beside captions of the same name, or under metadata.csv, .tsv or .jsonl)"
        )
    return files


class Ingest:
    """Checks on the way in. `caption_column` is for Parquet pools.

    max_pixels: larger images are refused from their header (a decompression bomb decodes to
    gigabytes).
    max_caption_bytes: longer captions are refused, not cut.
    max_bad_fraction: above this share of rejected samples in the whole pool the run stops: the
    pool is broken or of
    another layout, and a small dataset made of it would hide that.
    """

    name, version = "ingest", 1

    def __init__(
        self,
        *,
        caption_column: str = "caption",
        max_pixels: int = 50_000_000,
        max_caption_bytes: int = 20_000,
        max_bad_fraction: float = 0.5,
    ):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction {max_bad_fraction}: a fraction is in [0, 1]")
        self.caption_column = caption_column
        self.max_pixels, self.max_caption_bytes = max_pixels, max_caption_bytes
        self.max_bad_fraction = max_bad_fraction

    def check(self, sample: RawSample, notes: Counter) -> dict[str, Any] | str:
        """A row, or the reason of the rejection. `notes` counts what was unusual but usable."""
        if sample.problem:
            return sample.problem
        caption = sample.caption
        if caption is None or not caption.strip():
            return "missing_caption"
        size = len(caption) if isinstance(caption, bytes) else len(caption.encode(errors="replace"))
        if size > self.max_caption_bytes:
            return "caption_too_long"
        try:
            caption = caption.decode() if isinstance(caption, bytes) else caption
            caption.encode()
        except UnicodeError:
            return "caption_not_utf8"
        if sample.image is None:
            return "missing_image"
        try:
            image = open_image(sample.image, max_pixels=self.max_pixels)
            extension, mode = FORMATS[image.format], image.mode
            animated = getattr(image, "n_frames", 1) > 1
            to_rgb(image)
        except BadImage as error:
            return error.reason
        notes.update(
            note
            for note, found in (
                ("animated_first_frame_used", animated),
                ("cmyk_converted", mode == "CMYK"),
                ("16_bit_converted", mode.startswith("I")),
            )
            if found
        )
        return {
            "uid": sample.uid or content_uid(sample.image, caption),
            "caption": caption,
            "extension": extension,
            "width": image.width,
            "height": image.height,
            "num_bytes": len(sample.image),
            "sha256": sha256(sample.image).hexdigest(),
            "url": sample.url,
            "key": sample.key,
            "row": sample.row,
        }

    def run(self, file: Path) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
        """(rows, rejected, counts {read, kept, dropped, notes}) of one pool file."""
        rows, rejected, notes = [], [], Counter()
        for sample in read_samples(file, caption_column=self.caption_column):
            row = self.check(sample, notes)
            if isinstance(row, str):
                rejected.append({"uid": sample.uid, "key": sample.key, "reason": row})
            else:
                rows.append(row)
        # the reader of images walks a file forward
        table = pa.Table.from_pylist(rows, schema=ROWS).sort_by("row")
        counts = {
            "read": len(rows) + len(rejected),
            "kept": len(rows),
            "dropped": dict(Counter(row["reason"] for row in rejected)),
            "notes": dict(notes),
        }
        return table, pa.Table.from_pylist(rejected, schema=REJECTED), counts


def read_samples(file: Path, *, caption_column: str = "caption") -> Iterator[RawSample]:
    """Every sample of one pool file, readable or not, in the file's order."""
    if file.suffix == ".parquet":
        yield from _parquet_samples(file, caption_column)
    elif is_loose(file):
        for row, (key, picture, caption, problem) in enumerate(rows_of(file, caption_column)):
            yield RawSample(key, row, read_picture(picture), caption, problem=problem)
    else:
        yield from _tar_samples(file)


def _parquet_samples(file: Path, caption_column: str) -> Iterator[RawSample]:
    with file.open("rb") as stream:
        yield from _parquet_rows(file, pq.ParquetFile(stream), caption_column)


def _parquet_rows(file: Path, source: pq.ParquetFile, caption_column: str) -> Iterator[RawSample]:
    names = source.schema_arrow.names
    for column in ("image", caption_column):
        if column not in names:
            raise ValueError(
                f"{file}: no column {column!r} (it has: {', '.join(names)}); the layout is "
                "Hugging Face's image{bytes, path} beside a caption column: set "
                "ingest.caption_column to the name of the latter"
            )
    wanted = [c for c in ("image", caption_column, "url", "uid") if c in names]
    position = 0
    for batch in source.iter_batches(batch_size=256, columns=wanted):
        # as bytes: Parquet does not promise that a string column is UTF-8, and one bad row would
        # stop the batch
        texts = {
            name: batch.column(name).cast(pa.large_binary()).to_pylist() for name in wanted[1:]
        }
        images = batch.column("image")
        for row in range(len(batch)):
            image = images[row].as_py() or {}
            yield RawSample(
                key=f"{file.name}:{position}",
                row=position,
                image=image.get("bytes"),
                caption=texts[caption_column][row],
                url=_text(texts["url"][row]) if "url" in texts else None,
                uid=_safe_uid(_text(texts["uid"][row])) if "uid" in texts else None,
            )
            position += 1


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")


def _safe_uid(value: Any) -> str | None:
    return value if isinstance(value, str) and SAFE_UID.fullmatch(value) else None


def _tar_samples(file: Path) -> Iterator[RawSample]:
    """Samples of a tar: members grouped by key. A key seen before and a torn end are samples with
    a problem.
    """
    seen: set[str] = set()
    with file.open("rb") as stream:
        for key, members, torn in _tar_groups(stream):
            sample = _group(key, members)
            whole = sample.image is not None and sample.caption is not None
            if members and (whole or not torn):
                problem = "duplicate_key" if key in seen else None
                yield replace(sample, problem=problem)
                seen.add(key)
            if torn:
                log.warning("%s is cut short after %s: what lay behind is missing", file, key)
                key = f"after {key}" if whole else key
                yield RawSample(key, -1, None, None, problem="truncated_archive")


def _tar_groups(stream: Any) -> Iterator[tuple[str, dict[str, tuple[bytes, int]], bool]]:
    """(key, members by extension, whether the archive is cut here); neighbours of one key are a
    group.
    """
    members: dict[str, tuple[bytes, int]] = {}
    current, torn = "", False
    try:
        for name, data, offset in _tar_members(stream):
            folder, slash, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, extension = folder + slash + stem, extension.lower()
            if members and (key != current or extension in members):
                yield current, members, False
                members = {}
            current = key
            members[extension] = (data, offset)
    except (tarfile.TarError, EOFError) as error:
        torn = True
        log.debug("torn archive: %s", error)
    if members or torn:
        yield current, members, torn


def _tar_members(stream: Any) -> Iterator[tuple[str, bytes, int]]:
    """(name, data, offset of data) of the regular files. Raises EOFError where the file is cut."""
    with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=False) as archive:
        for info in archive:
            if not info.isfile() or info.issparse():  # sparse: a few bytes that say gigabytes
                continue
            data = archive.extractfile(info).read()
            if len(data) < info.size:
                raise EOFError(f"{info.name}: {len(data)} of {info.size} bytes")
            yield info.name, data, info.offset_data
        stream.seek(0, 2)
        # a whole archive ends with a block of zeros; without one, members behind the cut are
        # missing
        if stream.tell() < archive.offset + BLOCK:
            raise EOFError("no end-of-archive block")


def _group(key: str, members: dict[str, tuple[bytes, int]]) -> RawSample:
    fields: dict[str, Any] = {}
    if "json" in members:
        try:
            loaded = json.loads(members["json"][0])
        except ValueError:  # not JSON or not UTF-8: the txt member may still hold the caption
            loaded = None
        fields = loaded if isinstance(loaded, dict) else {}
    caption: str | bytes | None = members["txt"][0] if "txt" in members else fields.get("caption")
    found = [e for e in ("jpg", "jpeg", "png", "webp") if e in members]
    image, offset = members[found[0]] if found else (None, -1)
    return RawSample(key, offset, image, caption, fields.get("url"), _safe_uid(fields.get("uid")))


def read_images(file: Path, rows: list[int], sizes: list[int]) -> Iterator[bytes]:
    """Image bytes of ingested rows of one pool file, in the given (ascending) order of `row`."""
    if is_loose(file):
        yield from loose_images(file, rows)
        return
    with file.open("rb") as stream:
        if file.suffix == ".tar":
            for row, size in zip(rows, sizes, strict=True):
                stream.seek(row)
                yield stream.read(size)
        else:
            yield from _parquet_images(pq.ParquetFile(stream), rows)


def _parquet_images(source: pq.ParquetFile, rows: list[int]) -> Iterator[bytes]:
    wanted, position = iter(rows), 0
    target = next(wanted, None)
    for batch in source.iter_batches(batch_size=256, columns=["image"]):
        column = batch.column(0)
        while target is not None and target < position + len(batch):
            yield column[target - position]["bytes"].as_py()
            target = next(wanted, None)
        position += len(batch)
        if target is None:
            return
