"""A bounded folder of shards fetched from URLs, shared by the processes of a machine.

A shard is fetched once whoever asks, appears by rename, and the longest unread ones make room.
Readers map the files they opened, so a shard that is removed meanwhile stays readable for them.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec

from pipeline.shards import whole_file

log = logging.getLogger(__name__)

CHUNK = 8 << 20
TRIES = 3
PAUSE_SECONDS = 1.0  # before the second try; twice as long before the third
INDEXED = "indexed-"  # folders whose indexes cost a pass over the tars: only their tars make room


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it; endpoints and keys are fsspec's to configure.

    Raises ValueError when the protocol is unknown or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"data.shards={url}: {error}") from error


class FileCache:
    """directory: on a disk of the machine. gib: most that the shards in it may take."""

    def __init__(self, *, directory: str | Path, gib: float):
        if gib <= 0:
            raise ValueError(f"cache_gib {gib}: must be above 0")
        self.directory, self.limit = Path(directory), int(gib * 2**30)

    def folder(self, key: str, *, indexed: bool = False) -> Path:
        """The place of what belongs to a key."""
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.directory / f"{INDEXED if indexed else 'shards-'}{name}"

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

    def fetch(self, url: str, path: Path, *, size: int | None = None, sha256: str | None = None):
        """Have a file of a URL at `path`; call it under `locked(path)`. A tar makes room first.

        size, sha256: what it must be. Raises ValueError naming a file that is missing or another.
        """
        if path.exists():
            os.utime(path)  # read now: others go first when room is needed
            return
        for attempt in range(TRIES):
            try:
                self._copy(url, path, size, sha256)
                return
            except FileNotFoundError as error:
                raise ValueError(f"{url}: missing, but the manifest lists it") from error
            except OSError as error:
                if attempt == TRIES - 1:
                    raise ValueError(f"{url}: cannot be read ({error})") from error
                log.warning("%s: %s; trying again", url, error)
                time.sleep(PAUSE_SECONDS * 2**attempt)

    def _copy(self, url: str, path: Path, size: int | None, sha256: str | None) -> None:
        fs, remote = filesystem(url)
        if path.suffix == ".tar":
            self.make_room(fs.size(remote) or 0)
        digest, count = hashlib.sha256(), 0
        with fs.open(remote, "rb") as source, whole_file(path) as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                count += len(chunk)
                if sha256:
                    digest.update(chunk)
            refuse_other(url, size, count, sha256, digest.hexdigest() if sha256 else None)

    def make_room(self, needed: int) -> None:
        """Remove the longest unread shards until `needed` bytes fit."""
        if needed > self.limit:
            raise ValueError(
                f"cache_gib {self.limit / 2**30:g}: one shard has {needed / 2**30:.2f} GiB"
            )
        found = []
        for path in self.directory.glob("*/*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                if not path.is_symlink():
                    found.append((path.stat().st_mtime_ns, path, self._bytes(path)))
        taken = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if taken + needed <= self.limit:
                return
            with self.locked(path, wait=False) as ours:
                if ours:
                    path.unlink(missing_ok=True)
                    if not path.parent.name.startswith(INDEXED):
                        path.with_suffix(".parquet").unlink(missing_ok=True)
                    taken -= size

    @staticmethod
    def _bytes(path: Path) -> int:
        index = path.with_suffix(".parquet")
        return path.stat().st_size + (index.stat().st_size if index.exists() else 0)


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
