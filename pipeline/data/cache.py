"""A bounded folder of shards fetched from URLs, shared by the processes of a machine.

A shard is fetched once whoever asks, appears by rename, and the longest unread ones make room.
Readers map the files they opened, so a shard that is removed meanwhile stays readable for them.
"""

import contextlib
import fcntl
import glob
import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from pipeline.shards import whole_file

log = logging.getLogger(__name__)

CHUNK = 8 << 20
TRIES = 3
PAUSE_SECONDS = 1.0  # before the second try; twice as long before the third
PATIENCE_SECONDS = 60.0  # for room that others hold
PART = re.compile(r"\.(.+)\.(?:tar|parquet)\..+\.part")  # as whole_file names them
INDEXED = "indexed-"  # folders whose indexes cost a pass over the tars: only their tars make room


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it; endpoints and keys are fsspec's to configure.

    Raises ValueError when the protocol is unknown or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data.shards={url}: {error}") from error


@dataclass(frozen=True)
class Remote:
    """A file of a URL, where it goes, and what it must be (None: not compared)."""

    url: str
    path: Path
    size: int | None = None
    sha256: str | None = None

    def copy(self, fs: fsspec.AbstractFileSystem, remote: str) -> None:
        """Fetch it; it appears whole."""
        digest, count = hashlib.sha256(), 0
        with fs.open(remote, "rb") as source, whole_file(self.path) as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                count += len(chunk)
                if self.sha256:
                    digest.update(chunk)
            found = digest.hexdigest() if self.sha256 else None
            refuse_other(self.url, self.size, count, self.sha256, found)


class FileCache:
    """directory: on a disk of the machine. gib: most that the shards in it may take."""

    def __init__(self, *, directory: str | Path, gib: float):
        if not 0 < gib < math.inf:
            raise ValueError(f"cache_gib {gib}: must be above 0, and finite")
        self.directory, self.gib, self.limit = Path(directory), gib, int(gib * 2**30)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache={directory}: {error.strerror}; name a folder on a disk of the machine"
            ) from error

    def folder(self, key: str, *, prefix: str = "shards-") -> Path:
        """The place of what belongs to a key."""
        return self.directory / f"{prefix}{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    @contextlib.contextmanager
    def locked(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """One process, and one thread of it, at a time works on a path. Gives False when another
        one does and we do not wait.
        """
        lock = path.parent / ".locks" / path.name
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def fetch(self, files: Sequence[Remote], key: Path) -> None:
        """Have these files of one shard; call it under `locked(key)`.

        Room is made first. Raises ValueError naming a file that is missing or not what it must be.
        """
        absent = [file for file in files if not file.path.exists()]
        for file in files:
            if file not in absent:
                os.utime(file.path)  # read now: others go first when room is needed
        if not absent:
            return
        _remove_parts(key)
        sizes = [retried(file.url, lambda fs, path: fs.size(path)) or 0 for file in absent]
        with self.room(key, sum(sizes)):
            for file in absent:
                retried(file.url, file.copy)

    @contextlib.contextmanager
    def room(self, key: Path, needed: int) -> Iterator[None]:
        """Keep `needed` bytes free while a shard is written: the longest unread ones are removed.

        What other processes are writing counts as taken. Raises ValueError for more than there is.
        """
        if needed > self.limit:
            raise ValueError(f"cache_gib {self.gib:g}: one shard has {needed / 2**30:.3g} GiB")
        claim = self.directory / ".claims" / f"{key.parent.name}-{key.name}-{needed}"
        claim.parent.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + PATIENCE_SECONDS
        with open(claim, "wb") as file:
            try:
                while not self._claim(file, needed):
                    if time.monotonic() > until:
                        raise ValueError(
                            f"cache_gib {self.gib:g}: {self.directory} is full of shards that are "
                            "being read; raise data.cache_gib or lower data.window_shards"
                        )
                    time.sleep(0.05)  # others finish writing, or opening what we could remove
                yield
            finally:
                claim.unlink(missing_ok=True)

    def _claim(self, file: BinaryIO, needed: int) -> bool:
        """Hold a claim, if there is room for it: one process at a time decides."""
        with self.locked(self.directory / "room"):
            if not self._make_room(needed):
                return False
            fcntl.flock(file, fcntl.LOCK_EX)
            return True

    def _make_room(self, needed: int) -> bool:
        for part in self.directory.glob("*/.*.part"):
            if found := PART.fullmatch(part.name):
                shard = part.with_name(f"{found[1]}.tar")
                with self.locked(shard, wait=False) as ours:
                    if ours:
                        _remove_parts(shard)
        taken = self._claimed() + needed
        found = sorted(self._removable())
        taken += sum(size for _, size, _ in found)
        for _, size, files in found:
            if taken <= self.limit:
                break
            with self.locked(files[0].with_suffix(".tar"), wait=False) as ours:
                if ours:
                    for path in files:
                        path.unlink(missing_ok=True)
                    taken -= size
        return taken <= self.limit

    def _claimed(self) -> int:
        """Bytes that others are writing; a claim that nobody holds is a dead process's."""
        total = 0
        for path in (self.directory / ".claims").iterdir():
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    total += int(path.name.rsplit("-", 1)[1])
        return total

    def _removable(self) -> Iterator[tuple[int, int, list[Path]]]:
        """(time of the last reading, bytes, files) of each shard that can be fetched again."""
        shards: dict[Path, list[tuple[Path, os.stat_result]]] = {}
        for path in self.directory.glob("*/*.*"):
            indexed = path.parent.name.startswith(INDEXED)
            if path.suffix != ".tar" and (indexed or path.suffix != ".parquet"):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                if not path.is_symlink():
                    shards.setdefault(path.with_suffix(""), []).append((path, path.stat()))
        for files in shards.values():
            last = max(stat.st_mtime_ns for _, stat in files)
            yield last, sum(stat.st_size for _, stat in files), [path for path, _ in files]


def _remove_parts(key: Path) -> None:
    """What a killed process had written of a shard; call it under `locked(key)`."""
    for part in key.parent.glob(f".{glob.escape(key.stem)}.*.part"):
        found = PART.fullmatch(part.name)
        if found and found[1] == key.stem:
            part.unlink(missing_ok=True)


def retried(
    url: str,
    action: Callable[[fsspec.AbstractFileSystem, str], Any],
    *,
    missing: str = "missing, but the manifest or data.shards names it",
) -> Any:
    """action(file system, path), again after a failure that may pass.

    Raises ValueError that names the URL; `missing` is what it says of a file that is not there.
    """
    fs, path = filesystem(url)
    for attempt in range(TRIES):
        try:
            return action(fs, path)
        except ValueError:
            raise  # ours, of what was read
        except Exception as error:  # stores have errors of their own: aiohttp's are no OSError
            reason = error.__cause__ or error
            if isinstance(error, FileNotFoundError) and _is_absent(fs, error):
                raise ValueError(f"{url}: {missing}") from error
            if attempt == TRIES - 1:
                words = str(reason) or type(reason).__name__
                raise ValueError(f"{url}: cannot be read ({words})") from error
            log.warning("%s: %s; trying again", url, reason)
            time.sleep(PAUSE_SECONDS * 2**attempt)
    return None


def _is_absent(fs: fsspec.AbstractFileSystem, error: FileNotFoundError) -> bool:
    """fsspec's http says "not found" whatever happened, with what happened as the cause."""
    cause = error.__cause__
    return "http" not in fs.protocol or cause is None or getattr(cause, "status", None) == 404


def refuse_other(
    name: str, size: int | None, found: int, sha256: str | None, digest: str | None
) -> None:
    """Raise ValueError for a shard that is not the one its manifest describes."""
    if size is not None and size != found:
        raise ValueError(f"{name}: {found} bytes, the manifest says {size}; copy it again")
    if sha256 != digest:
        raise ValueError(
            f"{name}: sha256 {digest}, the manifest says {sha256}; copy it again, or find out who "
            "changed it"
        )
