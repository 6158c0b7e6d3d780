"""The contract between curation and training: records, shards, their index, and the manifest.

A dataset is a directory: `shard-000000.tar` (WebDataset layout: `{uid}.{jpg|png|webp}`,
`{uid}.json`, `{uid}.txt`),
`shard-000000.parquet` (the same records without images, with the byte offset and size of each
member), and
`manifest.json`, written last. Tars are plain: open_clip, webdataset and img2dataset's readers take
them too.
Bytes are a function of the records alone (mtime 0, fixed owner and mode), and every file appears
by rename.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = "pairwright-shards-1"
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
SHARD_NAME = re.compile(r"[^/\\\0]*[^/\\\0.][^/\\\0]*")  # a file of the directory, not `..`
BLOCK = 512  # a tar block
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, file size limit
CAPTION = pa.struct(
    [
        ("text", pa.string()),
        ("role", pa.string()),  # one of ROLES
        ("source", pa.string()),
        ("lang", pa.string()),
        ("score", pa.float64()),
        # of generated captions: what made them, so that a bank of many models stays traceable
        ("model", pa.string()),  # hash of the weights, or the server's name of the model
        ("prompt", pa.string()),  # hash of the prompt
        ("sampling", pa.string()),  # decoding settings, as JSON
    ]
)
CAPTIONS = pa.list_(CAPTION)  # a bank: what one source has to say of a pair
ROLES = ("alt", "short", "long", "rewrite", "paraphrase", "negative", "tag", "tag_negative")
MEMBERS = pa.struct([("image", pa.int64()), ("json", pa.int64()), ("txt", pa.int64())])
INDEX = pa.schema(
    [
        ("uid", pa.string()),
        ("extension", pa.string()),
        ("caption", pa.string()),
        ("captions", CAPTIONS),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("url", pa.string()),
        ("stats", pa.map_(pa.string(), pa.float64())),
        ("entries", pa.list_(pa.int32())),
        (
            "provenance",
            pa.struct([("pool", pa.string()), ("shard", pa.string()), ("key", pa.string())]),
        ),
        ("offset", MEMBERS),
        ("size", MEMBERS),
    ]
)


@dataclass(frozen=True)
class Record:
    """One pair. `image`: the original bytes; `caption`: the primary text; `info`: the JSON
    member's fields.
    """

    uid: str
    image: bytes
    extension: str
    caption: str
    info: dict[str, Any] = field(default_factory=dict)


def content_uid(image: bytes, caption: str) -> str:
    """First 32 hex digits of sha256(image bytes, 0x00, UTF-8 caption): the same pair is the same
    uid in any pool.
    """
    digest = hashlib.sha256(image)
    digest.update(b"\x00")
    digest.update(caption.encode())
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it appears under `path` when all is written: temporary name, fsync, rename.

    A failure leaves nothing behind. Raises ValueError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the node too: on a network file system another one may have a process of the same number
    part = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise ValueError(
                f"{path}: {error.strerror} while it was written. Nothing finished is lost: make "
                "room on that disk, then the same command goes on"
            ) from error
        raise


def write_atomically(path: Path, data: bytes | pa.Buffer) -> None:
    """A reader sees the old file or the whole new one."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, content: Any) -> None:
    """Deterministic, readable JSON, written atomically."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(path, text.encode() + b"\n")


def write_table(path: Path, table: pa.Table, *, rows_per_group: int | None = None) -> None:
    """A Parquet file, written atomically. The same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_per_group)
    write_atomically(path, sink.getvalue())


def read_rows(path: Path, start: int, count: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows [start, start + count) of a Parquet file; decodes only the row groups they are in."""
    source, groups, first, position = pq.ParquetFile(path), [], 0, 0
    for group in range(source.num_row_groups):
        rows = source.metadata.row_group(group).num_rows
        if position + rows > start and position < start + count:
            first = first if groups else position
            groups.append(group)
        position += rows
    return source.read_row_groups(groups, columns=columns).slice(start - first, count)


def _member(name: str, data: bytes) -> list[bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    return [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]


def write_shard(directory: Path, name: str, records: Iterable[Record]) -> dict[str, Any]:
    """Write `{name}.tar` and `{name}.parquet`; returns the manifest's entry {name, num_samples,
    num_bytes, sha256}.

    The tar is streamed to a temporary file, so memory holds one record and the index columns.
    """
    digest, position, rows = hashlib.sha256(), 0, []
    with whole_file(directory / f"{name}.tar") as file:
        for record in records:
            text = json.dumps(record.info, sort_keys=True, ensure_ascii=False)
            members = {
                "image": (record.extension, record.image),
                "json": ("json", text.encode()),
                "txt": ("txt", record.caption.encode()),
            }
            offset, size = {}, {}
            for member, (extension, data) in members.items():
                offset[member], size[member] = position + BLOCK, len(data)
                for piece in _member(f"{record.uid}.{extension}", data):
                    digest.update(piece)
                    position += file.write(piece)
            known = {key: record.info[key] for key in INDEX.names if key in record.info}
            known |= {"uid": record.uid, "extension": record.extension, "caption": record.caption}
            if known.get("stats"):
                known["stats"] = sorted(known["stats"].items())
            rows.append(known | {"offset": offset, "size": size})
        end = bytes(2 * BLOCK) + bytes(-(position + 2 * BLOCK) % tarfile.RECORDSIZE)
        digest.update(end)
        position += file.write(end)
        write_table(directory / f"{name}.parquet", pa.Table.from_pylist(rows, schema=INDEX))
    return {
        "name": name,
        "num_samples": len(rows),
        "num_bytes": position,
        "sha256": digest.hexdigest(),
    }


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json` last: its presence means that the dataset is complete."""
    for step in manifest["steps"]:
        dropped = sum(step["dropped"].values())
        assert step["read"] == step["kept"] + dropped, f"{step['name']}: pairs lost in counting"
    write_json(directory / "manifest.json", {"format": FORMAT, **manifest})


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a dataset directory. Raises ValueError when there is none, or of another
    format.
    """
    path = Path(directory) / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"{directory}: no manifest.json, so this is no finished dataset of ours; make one with "
            f"`python -m curation.run pool={directory} out=SHARDS dataset=raw`"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); copy it again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path}: format {version!r}, this version reads {FORMAT}")
    for key in ("shards", "steps"):
        if not isinstance(manifest.get(key), list):
            raise ValueError(f"{path}: no list of {key}; copy it again")
    for shard in manifest["shards"]:
        _refuse_entry(shard, path)
    return manifest


def _refuse_entry(shard: Any, path: Path) -> None:
    """An entry of a stranger's manifest names a file beside it, and counts."""
    name, count = (
        (shard.get("name"), shard.get("num_samples")) if isinstance(shard, dict) else (None, None)
    )
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise ValueError(f"{path}: {name!r} is no name of a shard in this directory")
    if not isinstance(count, int) or not 0 <= count < 2**53:
        raise ValueError(f"{path}: {name} has num_samples {count!r}, need a count")


class Shard:
    """Random access to one shard: the index in memory, the tar mapped. `columns`: which index
    columns to load. Raises ValueError, naming the file, for one that is missing or damaged.
    """

    def __init__(self, directory: str | Path, name: str, columns: list[str] | None = None):
        self.path = Path(directory) / f"{name}.tar"
        for path in (self.path, self.path.with_suffix(".parquet")):
            if not path.exists():
                raise ValueError(f"{path}: missing, but the manifest lists {name}; copy it again")
        with open(self.path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with self._damage():
            self.index = pq.read_table(self.path.with_suffix(".parquet"), columns=columns)
            self.offset, self.size = (
                self.index[column].combine_chunks().field("image").to_numpy().astype(np.int64)
                for column in ("offset", "size")
            )
            names = self.index.column_names
            lost = {"uid", "caption"}.difference(names) & set(columns or ("uid", "caption"))
            if lost:
                raise ValueError(f"no column {', '.join(sorted(lost))}")
            self.uids = self.index["uid"].to_pylist() if "uid" in names else []
            self.captions = self.index["caption"].to_pylist() if "caption" in names else []
        if len(self.offset):
            ends = self.offset + self.size
            if int(ends.max()) > len(self.data):
                raise ValueError(
                    f"{self.path}: {len(self.data)} bytes, the index needs more; copy it again"
                )
            if min(int(self.offset.min()), int(self.size.min()), int(ends.min())) < 0:
                raise ValueError(f"{self.path}: the index points before the file; copy it again")

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{self.path.with_suffix('.parquet')}: damaged ({error}); copy it again"
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.path.with_suffix('.parquet')}: damaged ({error}); copy it again"
            ) from error

    def __len__(self) -> int:
        return self.index.num_rows

    def image(self, row: int) -> bytes:
        """The image bytes of a row."""
        start = int(self.offset[row])
        return self.data[start : start + int(self.size[row])]

    def bank(self, row: int) -> list[dict[str, Any]]:
        """All captions of a row, the pool's own first."""
        with self._damage():
            return self.index["captions"][row].as_py() or []

    def record(self, row: int) -> Record:
        """The whole record of a row, its JSON member included."""
        with self._damage():
            values = self.index.slice(row, 1).to_pylist()[0]
            start, size = values["offset"]["json"], values["size"]["json"]
            info = json.loads(self.data[start : start + size])
            uid, extension, caption = (values[n] for n in ("uid", "extension", "caption"))
        return Record(uid, self.image(row), extension, caption, info)


class Dataset:
    """Random access to a dataset by global index (manifest order). Keeps `max_open` shards open."""

    def __init__(self, directory: str | Path, *, columns: list[str] | None = None, max_open=64):
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.names = [shard["name"] for shard in self.manifest["shards"]]
        counts = [shard["num_samples"] for shard in self.manifest["shards"]]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.columns = columns
        self.shard = lru_cache(max_open)(self._open)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _open(self, number: int) -> Shard:
        shard = Shard(self.directory, self.names[number], self.columns)
        expected = int(self.starts[number + 1] - self.starts[number])
        if len(shard) != expected:
            raise ValueError(
                f"{shard.path}: {len(shard)} records, the manifest says {expected}; copy it again"
            )
        return shard

    def locate(self, index: int) -> tuple[Shard, int]:
        """The shard and the row in it of a global index."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shard(number), int(index - self.starts[number])


def records(directory: str | Path) -> Iterator[Record]:
    """Every record of a dataset, in order."""
    dataset = Dataset(directory)
    for number in range(len(dataset.names)):
        shard = dataset.shard(number)
        for row in range(len(shard)):
            yield shard.record(row)
