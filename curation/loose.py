"""Pairs that lie about as files: pictures beside captions of the same name, or under a table.

    cats/1.jpg  cats/1.txt                     the caption is the text's content
    metadata.csv | .tsv | .jsonl               columns file_name, and caption or text
                                               (Hugging Face's imagefolder)

A "pool file" is a table, or a folder that has pictures and no table. Read one by one: good for some
hundred thousand pairs; for more, pack them into tars or Parquet once.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
TABLES = {"metadata.csv", "metadata.tsv", "metadata.jsonl"}
Loose = tuple[str, Path | None, str | bytes | None, str | None]  # key, picture, caption, problem


def loose_files(root: Path) -> list[Path]:
    """Tables, and folders of pictures that no table covers, below a local root; sorted."""
    tables = sorted(p for p in root.rglob("*") if p.name in TABLES and p.is_file())
    covered = [table.parent for table in tables]
    folders = {p.parent for p in root.rglob("*") if p.suffix.lower() in IMAGES and p.is_file()}
    free = sorted(f for f in folders if not any(f.is_relative_to(c) for c in covered))
    return [*tables, *free]


def is_loose(file: Path) -> bool:
    return file.name in TABLES or file.suffix not in (".tar", ".parquet")


def loose_identity(file: Path) -> dict[str, Any]:
    """Changes when a table, a picture or a caption does: sizes and times of all of them."""
    digest, total = hashlib.blake2b(digest_size=16), 0
    parts = [file, *(p for p in listing(file) if p is not None)]
    for path in parts:
        for one in (path, path.with_suffix(".txt")):
            if one.is_file():
                stat = one.stat()
                total += stat.st_size
                digest.update(f"{one.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {"bytes": total, "tag": digest.hexdigest()}


def listing(file: Path) -> list[Path | None]:
    """The picture of each row; None where a table names nothing inside its folder."""
    if file.name in TABLES:
        return [picture for _, picture, _, _ in rows_of(file, "caption")]
    return sorted(p for p in file.iterdir() if p.suffix.lower() in IMAGES and p.is_file())


def rows_of(file: Path, caption_column: str) -> Iterator[Loose]:
    """(key, picture, caption, problem) of each row, in a fixed order."""
    if file.name not in TABLES:
        for picture in listing(file):
            text = picture.with_suffix(".txt")
            yield picture.name, picture, text.read_bytes() if text.is_file() else None, None
        return
    for number, row in enumerate(table_rows(file)):
        name, caption = row.get("file_name"), row.get(caption_column, row.get("text"))
        key = f"{file.name}:{number}"
        if not isinstance(name, str) or not name:
            yield key, None, None, "unreadable_row"
            continue
        picture = file.parent / name
        # no file has a NUL in its name, and the system refuses to look for one
        inside = "\0" not in name and picture.resolve().is_relative_to(file.parent.resolve())
        problem = None if inside else "path_outside_the_pool"
        yield key, picture if inside else None, caption, problem


def table_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Raises ValueError for a table without a column file_name."""
    with open(file, encoding="utf-8", errors="replace", newline="") as stream:
        if file.suffix == ".jsonl":
            for line in stream:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = {}
                yield row if isinstance(row, dict) else {}
            return
        reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
        if "file_name" not in (reader.fieldnames or []):
            raise ValueError(
                f"{file}: no column file_name (it has: {', '.join(reader.fieldnames or [])}); "
                "needed are file_name, and caption or text"
            )
        try:
            yield from reader
        except csv.Error as error:
            raise ValueError(f"{file}: line {reader.line_num}: {error}") from error


def read_picture(picture: Path | None) -> bytes | None:
    """Its bytes; None where there is no such file."""
    return picture.read_bytes() if picture is not None and picture.is_file() else None


def loose_images(file: Path, rows: list[int]) -> Iterator[bytes]:
    """The pictures of these rows. Raises ValueError for one that is gone since it was ingested."""
    pictures = listing(file)
    for row in rows:
        data = read_picture(pictures[row])
        if data is None:
            raise ValueError(f"{pictures[row]} is gone since it was ingested: put it back")
        yield data
