"""Tars that are not ours (img2dataset, DataComp, any WebDataset): indexed once, then as ours.

Members `KEY.jpg|jpeg|png|webp` and `KEY.txt` are a pair, else the `caption` of `KEY.json`; members
of a pair lie together, and `captions` of `KEY.json` are read where they have our form. Whatever
else is in the tar (`.pyd`, `.pkl`, ...) is never read, so nothing in it is ever unpickled or run.
The index has the form of ours, lies in the cache, and is made by all processes of a machine
together. A pair's uid is its tar's name and its key, which curation would not take for an identity:
run curation for pairs to balance or to find again.
"""

import hashlib
import json
import logging
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.data.cache import CHUNK, INDEXED, FileCache, Remote
from pipeline.data.patterns import locations
from pipeline.shards import BLOCK, CAPTION, FORMAT, INDEX, ROLES, write_json, write_table

log = logging.getLogger(__name__)

IMAGES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
MAX_IMAGE = 100 << 20  # bytes; larger members are dropped and counted
MAX_TEXT = 1 << 20
VERSION = "2"  # raise it when the index of the same tar becomes another
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say half a character, which is no text
PAX_RECORD = re.compile(rb"(\d{1,9}) ")


@dataclass
class Pair:
    """Members of one key, as (offset, size)."""

    key: str
    extension: str = ""
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def _number(octal: bytes) -> int:
    if octal[0] & 0x80:  # GNU: 8 GiB and more in base 256
        return int.from_bytes(octal[1:], "big")
    return int(octal.rstrip(b"\0 ") or b"0", 8)


def members(data: mmap.mmap | bytes, name: str) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of the regular files of a tar. Raises ValueError when it is cut off."""
    position, longer, end = 0, None, len(data)
    while position + BLOCK <= end:
        header = data[position : position + BLOCK]
        if header[0] == 0:
            return
        try:
            size, kind = _number(header[124:136]), header[156:157]
        except ValueError as error:
            raise ValueError(f"{name}: no tar header at byte {position}; copy it again") from error
        start = position + BLOCK
        if size < 0 or start + size > end:  # a negative one would send us round for ever
            break
        if kind == b"L":  # GNU: the next member's name
            longer = data[start : start + size].rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":  # pax: the same, among other records
            longer = _pax_path(data[start : start + size]) or longer
        elif kind in (b"0", b"\0"):
            path = longer or header[:100].rstrip(b"\0").decode(errors="replace")
            # POSIX has a prefix field; GNU, whose magic ends in blanks, has other things there
            if longer is None and header[257:263] == b"ustar\0" and header[345]:
                prefix = header[345:500].split(b"\0", 1)[0].decode(errors="replace")
                path = f"{prefix}/{path}"
            yield path, start, size
        if kind not in (b"L", b"x", b"K", b"g"):  # the last two may lie between name and member
            longer = None
        position = start + -(-size // BLOCK) * BLOCK
    raise ValueError(
        f"{name}: ends at byte {end} without the closing blocks of a tar: the copy is cut off, "
        "or its writer was killed; copy it again"
    )


def _pax_path(records: bytes) -> str | None:
    """The value of `path` among records `LENGTH KEY=VALUE`; a value may hold anything."""
    position, path = 0, None
    while found := PAX_RECORD.match(records, position):
        position += int(found[1])
        if position <= found.end():
            break
        key, _, value = records[found.end() : position - 1].partition(b"=")
        path = value.decode(errors="replace") if key == b"path" else path
    return path


def key_of(path: str) -> tuple[str, str]:
    """The key of a member's pair, and its extension."""
    folder, _, base = path.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def is_of(uid: str, member: str) -> bool:
    """Whether a header's name is that of a pair; one that need not be in the header is taken."""
    key = uid.partition("/")[2]
    return not key.isascii() or len(key) >= 90 or key_of(member)[0] == key


def pairs(data: mmap.mmap | bytes, name: str, ignored: Counter) -> Iterator[Pair]:
    """The pairs of a tar, whole or not; counts members that are never read, by extension."""
    current = None
    for path, offset, size in members(data, name):
        key, extension = key_of(path)
        member = "image" if extension in IMAGES else extension
        if member not in ("image", "txt", "json"):
            ignored[extension] += 1
            continue
        again = current is not None and current.key == key and member in current.members
        if again and member == "image" and IMAGES[extension] != current.extension:
            ignored[extension] += 1  # a second picture of the pair
            continue
        if current is None or current.key != key or again:
            if current is not None:
                yield current
            current = Pair(key)
        current.members[member] = (offset, size)
        if member == "image":
            current.extension = IMAGES[extension]
    if current is not None:
        yield current


def _text(pair: Pair, member: str, data: mmap.mmap | bytes) -> str | None:
    offset, size = pair.members.get(member, (0, 0))
    if not 0 < size <= MAX_TEXT:
        return None
    try:
        return data[offset : offset + size].decode()
    except ValueError:
        return None


def _content(pair: Pair, data: mmap.mmap | bytes) -> dict[str, Any]:
    """Its `.json`; empty when there is none, or no object."""
    try:
        content = json.loads(_text(pair, "json", data) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def caption_of(pair: Pair, data: mmap.mmap | bytes) -> str | None:
    """The text of `.txt`, else `caption` of `.json`; None when neither is usable."""
    text = _text(pair, "txt", data)
    if text and not text.isspace():
        return text
    text = _content(pair, data).get("caption")
    return text if _is_text(text) else None


def bank_of(pair: Pair, data: mmap.mmap | bytes) -> list[dict[str, Any]] | None:
    """`captions` of `.json`, as our shards have them; what has another form is left out."""
    offset, size = pair.members.get("json", (0, 0))
    if data.find(b'"captions"', offset, offset + size) < 0:  # parsing all would take twice as long
        return None
    captions = _content(pair, data).get("captions")
    bank = [
        {field.name: _value(entry.get(field.name), field.type) for field in CAPTION}
        for entry in (captions if isinstance(captions, list) else [])
        if isinstance(entry, dict) and entry.get("role") in ROLES and _is_text(entry.get("text"))
    ]
    return bank or None


def _value(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return value if _is_text(value) else None
    return float(value) if isinstance(value, int | float) and abs(value) < 2**53 else None


def reason_to_drop(pair: Pair, caption: str | None) -> str | None:
    """Why a pair is not used; None: it is."""
    if "image" not in pair.members:
        return "no_image"
    if pair.members["image"][1] > MAX_IMAGE:
        return "large_image"
    return "no_caption" if caption is None else None


def build_index(data: mmap.mmap | bytes, name: str, *, prefix: str | None = None) -> pa.Table:
    """A tar as rows of the index; counts are in the schema's metadata.

    prefix: of the uids; None: the tar's name.
    """
    prefix = prefix or Path(name).stem
    uids, extensions, captions, banks = [], [], [], []
    offsets, sizes = ({key: [] for key in ("image", "json", "txt")} for _ in range(2))
    dropped, ignored, keys = Counter(), Counter(), set()
    for pair in pairs(data, name, ignored):
        caption = caption_of(pair, data)
        reason = reason_to_drop(pair, caption)
        if reason is None and pair.key in keys:
            reason = "repeated_key"
        if reason:
            dropped[reason] += 1
            continue
        keys.add(pair.key)
        uids.append(f"{prefix}/{pair.key}")
        extensions.append(pair.extension)
        captions.append(caption)
        banks.append(bank_of(pair, data))
        for member in offsets:
            offset, size = pair.members.get(member, (None, None))
            offsets[member].append(offset)
            sizes[member].append(size)
    known = {"uid": uids, "extension": extensions, "caption": captions, "captions": banks}
    columns = []
    for column in INDEX:
        if column.name in known:
            columns.append(pa.array(known[column.name], column.type))
        elif column.name in ("offset", "size"):
            values = offsets if column.name == "offset" else sizes
            arrays = [pa.array(values[f.name], f.type) for f in column.type]
            columns.append(pa.StructArray.from_arrays(arrays, fields=list(column.type)))
        else:
            columns.append(pa.nulls(len(uids), column.type))
    facts = {"num_bytes": len(data), "dropped": dropped, "ignored": ignored}
    facts["num_banks"] = sum(bank is not None for bank in banks)
    schema = INDEX.with_metadata({"tar": json.dumps(facts)})
    return pa.Table.from_arrays(columns, schema=schema)


def read_foreign(shards: str, cache: FileCache) -> Path:
    """The cache folder where the tars have an index and a manifest of our form; made if need be.

    Raises ValueError when a tar is missing, cut off, or another than was indexed.
    """
    urls = locations(shards)
    folder = cache.folder("\n".join([VERSION, *urls]), prefix=INDEXED)
    names = [f"{number:06d}-{Path(url).stem}" for number, url in enumerate(urls)]
    if not (folder / "manifest.json").exists():
        _index_all(urls, names, folder, cache)
        write_json(folder / "manifest.json", _manifest(shards, urls, names, folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"]:
        refuse_changed(entry, folder)
    return folder


def _index_all(urls: list[str], names: list[str], folder: Path, cache: FileCache) -> None:
    """Price: of URLs, every byte is fetched once by each machine; of files, read once."""
    same, waiting = Counter(Path(url).stem for url in urls), []
    work = [
        # a uid tells tars of one name apart
        (url, folder / f"{name}.tar", name if same[Path(url).stem] > 1 else None)
        for url, name in zip(urls, names, strict=True)
    ]
    with (
        cache.locked(folder / "progress", wait=False) as ours,  # one bar a machine
        tqdm(total=len(work), desc="index", unit="tar", disable=not ours) as bar,
    ):
        for one in work:  # first what no other process is at
            if _index(*one, cache, wait=False):
                bar.update()
            else:
                waiting.append(one)
        for one in waiting:
            _index(*one, cache, wait=True)
            bar.update()


def _index(url: str, tar: Path, prefix: str | None, cache: FileCache, *, wait: bool) -> bool:
    """Whether a tar has its index now."""
    index = tar.with_suffix(".parquet")
    with cache.locked(tar, wait=wait) as ours:
        if not ours or index.exists():
            return ours
        if "://" in url:
            cache.fetch([Remote(url, tar)], tar)
        else:
            if not Path(url).exists():
                raise ValueError(f"{url}: missing, but data.shards names it")
            tar.unlink(missing_ok=True)
            tar.symlink_to(url)
        try:
            write_table(index, _indexed(url, tar, prefix))
        except ValueError:
            if "://" in url:
                tar.unlink(missing_ok=True)  # else a better copy would never be fetched
            raise
    return True


def _indexed(url: str, tar: Path, prefix: str | None) -> pa.Table:
    """The index of a local tar, with what tells whether it is still the same one."""
    with open(tar, "rb") as file:
        if not file.seek(0, 2):
            raise ValueError(f"{url}: 0 bytes; copy it again")
        written = os.fstat(file.fileno()).st_mtime_ns
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        table = build_index(data, url, prefix=prefix)
        facts = json.loads(table.schema.metadata[b"tar"]) | {"sha256": sha256(data)}
    if "://" not in url:
        facts["mtime_ns"] = written
    return table.replace_schema_metadata({"tar": json.dumps(facts)})


def sha256(data: mmap.mmap | bytes) -> str:
    """Of a mapped file, which need not fit in memory."""
    digest = hashlib.sha256()
    for start in range(0, len(data), CHUNK):
        digest.update(data[start : start + CHUNK])
    return digest.hexdigest()


def refuse_changed(entry: dict[str, Any], folder: Path) -> None:
    """Raise ValueError when a local tar is not the one that its entry of the manifest is of."""
    if "://" in entry["url"]:
        return
    path = Path(entry["url"])
    if not path.exists():
        raise ValueError(f"{path}: missing, but data.shards names it")
    found = path.stat()
    if found.st_size != entry["num_bytes"]:
        raise ValueError(
            f"{path}: {found.st_size} bytes, its index was made of {entry['num_bytes']}; remove "
            f"{folder} to index anew"
        )
    if found.st_mtime_ns != entry["mtime_ns"]:
        raise ValueError(f"{path}: written after its index was made; remove {folder} to index anew")


def _manifest(shards: str, urls: list[str], names: list[str], folder: Path) -> dict[str, Any]:
    entries, dropped, ignored, num_banks = [], Counter(), Counter(), 0
    for url, name in zip(urls, names, strict=True):
        schema = pq.read_metadata(folder / f"{name}.parquet")
        facts = json.loads(schema.schema.to_arrow_schema().metadata[b"tar"])
        dropped.update(facts.pop("dropped"))
        ignored.update(facts.pop("ignored"))
        num_banks += facts.pop("num_banks")
        entries.append({"name": name, "url": url, "num_samples": schema.num_rows, **facts})
    kept = sum(entry["num_samples"] for entry in entries)
    if dropped or ignored:
        log.warning(
            "%s: %d pairs; dropped %s; members never read %s",
            shards,
            kept,
            dict(dropped),
            dict(ignored),
        )
    step = {"name": "index", "read": kept + dropped.total(), "kept": kept, "dropped": dropped}
    found = {"num_samples": kept, "num_banks": num_banks, "shards": entries, "steps": [step]}
    return {"format": FORMAT, **found}
