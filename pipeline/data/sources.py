"""Where shards come from: a directory, a URL through a bounded cache, or foreign tars.

Each is a `Dataset` with random access; what is missing or not what the manifest says is refused by
name, as a whole at the start where a listing can tell, else when a shard is opened.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.cache import CHUNK, FileCache, Remote, filesystem, refuse_other
from pipeline.data.foreign import is_pattern, read_foreign
from pipeline.shards import BLOCK, Dataset, Shard, read_manifest, write_atomically

log = logging.getLogger(__name__)

Verify = Literal["size", "sha256", "none"]
COLUMNS = ["uid", "caption", "offset", "size"]
FETCHERS = 4  # threads of a process that fetch ahead; a bucket serves several at once


def open_dataset(
    shards: str,
    *,
    window_shards: int,
    columns: list[str] | None = None,
    verify: Verify = "size",
    cache: FileCache | None = None,
) -> "LocalDataset":
    """A directory of ours (path or URL with ://), or foreign tars (names or patterns: foreign.py).

    verify: "size", of every tar at the start; "sha256", of each tar when it is opened (reads it
    whole, in each process: about a second a gigabyte) or fetched (on the way); "none".
    Raises ValueError for what is missing or other than its manifest says, by name.
    """
    if verify not in ("size", "sha256", "none"):
        raise ValueError(f"verify {verify!r}: size, sha256 or none")
    knobs = {"columns": columns, "verify": verify, "window_shards": window_shards}
    shards = shards.removeprefix("file://")
    if not is_pattern(shards) and "://" not in shards:
        return LocalDataset(shards, **knobs)
    if cache is None:
        raise ValueError(
            f"data.shards={shards} is fetched or indexed first: set data.cache to a folder on a "
            "disk of the machine"
        )
    if is_pattern(shards):
        folder = read_foreign(shards, cache)
        return CachedDataset(folder, url=None, cache=cache, **knobs)
    fs, remote = filesystem(shards)
    try:
        manifest = fs.cat_file(f"{remote.rstrip('/')}/manifest.json")
    except FileNotFoundError as error:
        raise ValueError(f"{shards}: no manifest.json, so this is no dataset of ours") from error
    # the manifest is in the folder's name: a dataset that was made anew is another one
    folder = cache.folder(f"{shards} {hashlib.sha256(manifest).hexdigest()}")
    write_atomically(folder / "manifest.json", manifest)
    return CachedDataset(folder, url=shards.rstrip("/"), cache=cache, **knobs)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when a file is written or replaced; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def refuse_other_members(shard: Shard) -> None:
    """Raise ValueError when a tar's first or last pair is not its index's: one was replaced.

    Price: two pages. A tar of the same size and ends is what verify=sha256 is for.
    """
    for row in {0, len(shard) - 1} - {-1}:
        start = int(shard.offset[row]) - BLOCK
        member = shard.data[max(start, 0) : start + BLOCK][:100].split(b"\0")[0].decode("latin-1")
        if len(shard.uids[row]) < 90 and member.rpartition(".")[0] != shard.uids[row]:
            raise ValueError(
                f"{shard.path}: its index has uid {shard.uids[row]} where the tar has "
                f"{member[:90]!r}: one of both was replaced; copy them again"
            )


class LocalDataset(Dataset):
    """A dataset directory whose files are compared with the manifest."""

    def __init__(
        self,
        directory: str | Path,
        *,
        window_shards: int,
        columns: list[str] | None = None,
        verify: Verify = "size",
    ):
        # two windows at least: fewer open shards would be opened again pair by pair
        super().__init__(directory, columns=columns, max_open=max(64, 2 * window_shards))
        self.verify = verify
        self.listed = stamp(self.directory / "manifest.json")
        self.verify_files()

    def refuse_other_manifest(self) -> None:
        """Raise ValueError when the dataset was replaced by another."""
        now = stamp(self.directory / "manifest.json")
        if now != self.listed and read_manifest(self.directory) != self.manifest:
            raise ValueError(
                f"{self.directory}: manifest.json is not the one of this run's shards any more: "
                "give them back"
            )
        self.listed = now

    def refuse_cut(self, shard: Shard) -> None:
        """Raise ValueError when a tar has another size than when it was opened.

        What lies behind the end of a file that is cut reads as zeros up to the next page.
        """
        with contextlib.suppress(FileNotFoundError):  # its bytes are still there for who has it
            refuse_other(str(shard.path), len(shard.data), os.stat(shard.path).st_size, None, None)

    def verify_files(self) -> None:
        """Compare sizes with the manifest, where `verify` asks for anything."""
        if self.verify != "none":
            self.compare_listing()

    def compare_listing(self) -> None:
        """Raise ValueError naming shards that are missing or of another size."""
        with os.scandir(self.directory) as entries:
            self.refuse_sizes({e.name: e.stat().st_size for e in entries if e.is_file()})

    def refuse_sizes(self, found: dict[str, int | None]) -> None:
        """The same for a listing as {file name: bytes, None if the store does not say}."""
        wrong = []
        for shard in self.manifest["shards"]:
            for name in (f"{shard['name']}.tar", f"{shard['name']}.parquet"):
                size, wanted = found.get(name, -1), shard["num_bytes"]
                if size == -1:
                    wrong.append(f"{name} is missing")
                elif name.endswith(".tar") and size not in (None, wanted):
                    wrong.append(f"{name} has {size} bytes, the manifest says {wanted}")
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"{self.directory}: {'; '.join(wrong[:5])}{more}. Copy them again")

    def _open(self, number: int) -> Shard:
        shard, entry = super()._open(number), self.manifest["shards"][number]
        if self.verify == "none":
            return shard
        # once more: shards may be replaced while a run goes on
        self.refuse_other_manifest()
        refuse_other(str(shard.path), entry["num_bytes"], len(shard.data), None, None)
        refuse_other_members(shard)
        if self.verify == "sha256" and entry.get("sha256"):
            digest = hashlib.sha256()
            for start in range(0, len(shard.data), CHUNK):
                digest.update(shard.data[start : start + CHUNK])
            refuse_other(
                str(shard.path), None, len(shard.data), entry["sha256"], digest.hexdigest()
            )
        return shard

    def index_path(self, number: int) -> Path:
        """The index of a shard, as a local file."""
        return self.directory / f"{self.names[number]}.parquet"

    def read_ahead(self, numbers: Iterable[int]) -> None:
        """That these shards are read next. The operating system reads local files ahead."""


class CachedDataset(LocalDataset):
    """A dataset whose tars are fetched when they are read, and by threads before that.

    url: where shards lie; None: each entry of the manifest has its own, and the index is here.
    """

    def __init__(self, directory: Path, *, url: str | None, cache: FileCache, **knobs):
        self.url, self.cache = url, cache
        self.pending: list[Future] = []
        self.pool: ThreadPoolExecutor | None = None
        self.pool_process = 0
        super().__init__(directory, **knobs)
        self.refuse_small_cache(knobs["window_shards"])

    def compare_listing(self) -> None:
        if self.url is None:
            return  # read_foreign has just looked at them
        fs, remote = filesystem(self.url)
        if "http" in fs.protocol or "https" in fs.protocol:
            return  # a web server need not list, nor list sizes
        entries = fs.ls(remote, detail=True)
        self.refuse_sizes({e["name"].rsplit("/", 1)[-1]: e.get("size") for e in entries})

    def refuse_small_cache(self, window_shards: int) -> None:
        """Raise ValueError when the window that is read and the next one do not fit."""
        sizes = sorted(
            (
                shard["num_bytes"]
                for shard in self.manifest["shards"]
                if self.url or "://" in shard["url"]
            ),
            reverse=True,
        )
        needed = sum(sizes[: 2 * window_shards])
        if needed > self.cache.limit:
            raise ValueError(
                f"data.cache_gib={self.cache.gib:g}: two windows of {window_shards} "
                f"shards take up to {needed / 2**30:.3g} GiB and would push each other out; raise "
                "data.cache_gib or lower data.window_shards"
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pool": None, "pending": []}

    def files(self, number: int) -> list[Remote]:
        """What to fetch for a shard."""
        entry, folder = self.manifest["shards"][number], self.directory
        tar, index = folder / f"{entry['name']}.tar", folder / f"{entry['name']}.parquet"
        size = entry["num_bytes"] if self.verify != "none" else None
        digest = entry.get("sha256") if self.verify == "sha256" else None
        if self.url is None:
            # an index belongs to the bytes it was made of, so that size is always compared
            return [Remote(entry["url"], tar, entry["num_bytes"])] if "://" in entry["url"] else []
        url = f"{self.url}/{entry['name']}"
        return [Remote(f"{url}.tar", tar, size, digest), Remote(f"{url}.parquet", index)]

    def _open(self, number: int) -> Shard:
        name = self.directory / f"{self.names[number]}.tar"
        with self.cache.locked(name):
            self.cache.fetch(self.files(number), name)
            # compared on the way here: the base would read a fetched tar once more
            return Dataset._open(self, number)

    def index_path(self, number: int) -> Path:
        """The same, fetched if need be."""
        path = super().index_path(number)
        if self.url is not None:
            tar = path.with_suffix(".tar")
            with self.cache.locked(tar):
                self.cache.fetch([Remote(f"{self.url}/{path.name}", path)], tar)
        return path

    def _fetch_ahead(self, number: int) -> None:
        name = self.directory / f"{self.names[number]}.tar"
        with self.cache.locked(name, wait=False) as ours:
            if ours:  # else another process fetches it already
                self.cache.fetch(self.files(number), name)

    def read_ahead(self, numbers: Iterable[int]) -> None:
        """Fetch these shards in threads, in this order; forget what was asked for before."""
        if self.pool is None or self.pool_process != os.getpid():  # threads do not survive a fork
            self.pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="shards")
            self.pool_process, self.pending = os.getpid(), []
        for future in self.pending:
            future.cancel()
        self.pending = [self.pool.submit(self._try_ahead, int(number)) for number in numbers]

    def _try_ahead(self, number: int) -> None:
        # whoever needs the shard meets the same error and raises it
        with contextlib.suppress(ValueError):
            self._fetch_ahead(number)


def windows_ahead(order, epoch: int, window: int) -> np.ndarray:
    """The shards of a window and of the next one, in the order they are wanted."""
    return np.concatenate([order.window_of_shards(epoch, w) for w in (window, window + 1)])
