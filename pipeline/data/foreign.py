"""Tars that are not ours (img2dataset, DataComp, any WebDataset): indexed once, then as ours.

`data.shards` takes names and patterns: `DIR/{00000..01242}.tar`, `a.tar::b.tar`, `DIR/*.tar`, with
any fsspec protocol. Members `KEY.jpg|jpeg|png|webp` and `KEY.txt` are a pair, else the `caption` of
`KEY.json`; members of a pair lie together. Whatever else is in the tar (`.pyd`, `.pkl`, ...) is
never read, so nothing in it is ever unpickled or run. The index has the form of ours, lies in the
cache, and is made by all processes of a machine together. A tar's uid is its name and key, which
curation would not take for an identity: run curation for pairs to balance or to find again.
"""

import json
import logging
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.cache import INDEXED, FileCache, Remote, filesystem
from pipeline.shards import BLOCK, FORMAT, INDEX, write_json, write_table

log = logging.getLogger(__name__)

IMAGES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
MAX_IMAGE = 100 << 20  # bytes; larger members are dropped and counted
MAX_TEXT = 1 << 20
VERSION = "1"  # raise it when the index of the same tar becomes another


def is_pattern(shards: str) -> bool:
    """Whether `shards` names tars rather than a directory of ours."""
    return any(re.search(r"^pipe:|\.(tar|tar\.gz|tgz)$", part) for part in shards.split("::"))


def expand(pattern: str) -> list[str]:
    """`a{00..11}b` and `{x,y}` written out, from left to right."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        if int(last) < int(first):
            raise ValueError(f"data.shards={pattern}: {{{found[1]}}} counts down")
        width = len(first) if first.startswith("0") else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        words = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + word + rest for word in words for rest in expand(after)]


def locations(shards: str) -> list[str]:
    """The tars that `shards` names, in order. Raises ValueError when there are none."""
    found = []
    for part in shards.split("::"):
        part = part.removeprefix("file://")
        if part.startswith("pipe:"):
            raise ValueError(f"data.shards={part}: commands are not run; give a URL of fsspec")
        if not part.endswith(".tar"):
            raise ValueError(f"data.shards={part}: unpack it to .tar, which can be read anywhere")
        for name in expand(part):
            if "*" in name or "?" in name:
                fs, remote = filesystem(name)
                names = sorted(fs.glob(remote))
                found += [fs.unstrip_protocol(n) if "://" in name else n for n in names]
            else:
                found.append(name)
    if not found:
        raise ValueError(f"data.shards={shards}: no tar has such a name")
    return found


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
            found = re.search(rb"\d+ path=([^\n]*)\n", data[start : start + size])
            longer = found[1].decode(errors="replace") if found else longer
        elif kind in (b"0", b"\0"):
            path = longer or header[:100].rstrip(b"\0").decode(errors="replace")
            # POSIX has a prefix field; GNU, whose magic ends in blanks, has other things there
            if longer is None and header[257:263] == b"ustar\0" and header[345]:
                prefix = header[345:500].split(b"\0", 1)[0].decode(errors="replace")
                path = f"{prefix}/{path}"
            yield path, start, size
            longer = None
        position = start + -(-size // BLOCK) * BLOCK
    raise ValueError(
        f"{name}: ends at byte {end} without the closing blocks of a tar: the copy is cut off, "
        "or its writer was killed; copy it again"
    )


def pairs(data: mmap.mmap | bytes, name: str, ignored: Counter) -> Iterator[Pair]:
    """The pairs of a tar, whole or not; counts members that are never read, by extension."""
    current = None
    for path, offset, size in members(data, name):
        folder, _, base = path.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
        member = "image" if extension in IMAGES else extension
        if member not in ("image", "txt", "json"):
            ignored[extension] += 1
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Pair(key)
        if member not in current.members:
            current.members[member] = (offset, size)
            if member == "image":
                current.extension = IMAGES[extension]
    if current is not None:
        yield current


def caption_of(pair: Pair, data: mmap.mmap | bytes) -> str | None:
    """The text of `.txt`, else `caption` of `.json`; None when neither is usable."""
    for member in ("txt", "json"):
        offset, size = pair.members.get(member, (0, 0))
        if not 0 < size <= MAX_TEXT:
            continue
        try:
            text = data[offset : offset + size].decode()
            if member == "json":
                content = json.loads(text)
                text = content.get("caption") if isinstance(content, dict) else None
        except (ValueError, RecursionError):
            continue
        if isinstance(text, str) and text.strip():
            return text
    return None


def reason_to_drop(pair: Pair, caption: str | None) -> str | None:
    """Why a pair is not used; None: it is."""
    if "image" not in pair.members:
        return "no_image"
    if pair.members["image"][1] > MAX_IMAGE:
        return "large_image"
    return "no_caption" if caption is None else None


def build_index(data: mmap.mmap | bytes, name: str) -> pa.Table:
    """A tar as rows of the index; counts are in the schema's metadata."""
    uids, extensions, captions = [], [], []
    offsets, sizes = ({key: [] for key in ("image", "json", "txt")} for _ in range(2))
    dropped, ignored, stem = Counter(), Counter(), Path(name).stem
    for pair in pairs(data, name, ignored):
        caption = caption_of(pair, data)
        reason = reason_to_drop(pair, caption)
        if reason:
            dropped[reason] += 1
            continue
        uids.append(f"{stem}/{pair.key}")
        extensions.append(pair.extension)
        captions.append(caption)
        for member in offsets:
            offset, size = pair.members.get(member, (None, None))
            offsets[member].append(offset)
            sizes[member].append(size)
    known = {"uid": uids, "extension": extensions, "caption": captions}
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
        for wait in (False, True):  # first what no other process is at
            for url, name in zip(urls, names, strict=True):
                _index(url, folder / f"{name}.tar", cache, wait=wait)
        write_json(folder / "manifest.json", _manifest(shards, urls, names, folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["shards"]:
        if "://" not in entry["url"]:
            _refuse_changed(entry["url"], entry["num_bytes"], folder)
    return folder


def _index(url: str, tar: Path, cache: FileCache, *, wait: bool) -> None:
    index = tar.with_suffix(".parquet")
    with cache.locked(tar, wait=wait) as ours:
        if not ours or index.exists():
            return
        if "://" in url:
            cache.fetch([Remote(url, tar)], tar)
        else:
            if not Path(url).exists():
                raise ValueError(f"{url}: missing, but data.shards names it")
            tar.unlink(missing_ok=True)
            tar.symlink_to(Path(url).absolute())
        with open(tar, "rb") as file:
            empty = not file.seek(0, 2)
            if empty:
                raise ValueError(f"{url}: 0 bytes; copy it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with data:
            write_table(index, build_index(data, url))


def _refuse_changed(url: str, wanted: int, folder: Path) -> None:
    size = Path(url).stat().st_size if Path(url).exists() else None
    if size is None:
        raise ValueError(f"{url}: missing, but data.shards names it")
    if size != wanted:
        raise ValueError(
            f"{url}: {size} bytes, its index was made of {wanted}; remove {folder} to index anew"
        )


def _manifest(shards: str, urls: list[str], names: list[str], folder: Path) -> dict:
    entries, dropped, ignored = [], Counter(), Counter()
    for url, name in zip(urls, names, strict=True):
        schema = pq.read_metadata(folder / f"{name}.parquet")
        facts = json.loads(schema.schema.to_arrow_schema().metadata[b"tar"])
        dropped.update(facts["dropped"])
        ignored.update(facts["ignored"])
        entry = {"name": name, "url": url, "num_samples": schema.num_rows}
        entries.append(entry | {"num_bytes": facts["num_bytes"]})
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
    return {"format": FORMAT, "num_samples": kept, "shards": entries, "steps": [step]}
