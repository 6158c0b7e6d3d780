"""Where shards come from: a directory, a URL through a bounded cache, or foreign tars.

Each is a `Dataset` with random access; what is missing or not what the manifest says is refused by
name, as a whole at the start where a listing can tell, else when a shard is opened.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.data.cache import FileCache, Remote, filesystem, refuse_other, retried
from pipeline.data.foreign import is_of, read_foreign, refuse_changed, sha256
from pipeline.data.patterns import is_pattern, refuse_unreadable
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
    """A directory of ours (path or URL with ://), or foreign tars (names or patterns: patterns.py).

    verify: "size", of every tar at the start; "sha256", of each tar when it is opened (reads it
    whole, in each process: about a second a gigabyte) or fetched (on the way); "none".
    Raises ValueError for what is missing or other than its manifest says, by name.
    """
    if verify not in ("size", "sha256", "none"):
        raise ValueError(f"verify {verify!r}: size, sha256 or none")
    knobs = {"columns": columns, "verify": verify, "window_shards": window_shards}
    shards = shards.removeprefix("file://")
    if not is_pattern(shards) and "://" not in shards:
        refuse_folder_of_tars(Path(shards))
        return LocalDataset(shards, **knobs)
    if is_pattern(shards):
        refuse_unreadable(shards)
    if cache is None:
        raise ValueError(
            f"data.shards={shards} is fetched or indexed first: set data.cache to a folder on a "
            "disk of the machine"
        )
    if is_pattern(shards):
        return ForeignDataset(read_foreign(shards, cache), cache=cache, **knobs)
    shards = shards.rstrip("/")
    manifest = retried(
        shards,
        lambda fs, path: fs.cat_file(f"{path}/manifest.json"),
        missing="no manifest.json, so this is no dataset of ours; tars of others: URL/*.tar",
    )
    # the manifest is in the folder's name: a dataset that was made anew is another one
    folder = cache.folder(f"{shards} {hashlib.sha256(manifest).hexdigest()}")
    write_atomically(folder / "manifest.json", manifest)
    return CachedDataset(folder, url=shards, cache=cache, **knobs)


def refuse_folder_of_tars(directory: Path) -> None:
    """Raise ValueError for a folder of tars that are not ours."""
    if not (directory / "manifest.json").exists() and any(directory.glob("*.tar")):
        raise ValueError(
            f"{directory}: tars, but no manifest.json, so this is no finished dataset of ours. "
            f"Train on them as they are with \"data.shards='{directory}/*.tar'\" data.cache=FOLDER,"
            f" or curate them first: `python -m curation.run pool={directory} out=SHARDS "
            "dataset=raw`"
        )


def refuse_small_cache(
    cache: FileCache | None, datasets: Sequence["LocalDataset"], window_shards: int
) -> None:
    """Raise ValueError when the windows that are read and the next ones do not fit together."""
    needed = sum(dataset.fetched_bytes(2 * window_shards) for dataset in datasets)
    if cache is not None and needed > cache.limit:
        several = f" of each of {len(datasets)} datasets" if len(datasets) > 1 else ""
        raise ValueError(
            f"data.cache_gib={cache.gib:g}: two windows of {window_shards} shards{several} take up "
            f"to {needed / 2**30:.3g} GiB and would push each other out; raise data.cache_gib or "
            "lower data.window_shards"
        )


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when a file is written or replaced; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def is_named(uid: str, member: str) -> bool:
    """Whether a header's name is that of a pair of ours; a long one is not all in the header."""
    return len(uid) >= 90 or member.rpartition(".")[0] == uid


def refuse_other_members(shard: Shard, is_of: Callable[[str, str], bool] = is_named) -> None:
    """Raise ValueError when a tar's first or last pair is not its index's: one was replaced.

    is_of: of a uid and a member's name in its header. Price: two pages. A tar of the same size and
    ends is what verify=sha256 is for.
    """
    for row in {0, len(shard) - 1} - {-1}:
        start = int(shard.offset[row]) - BLOCK
        member = shard.data[max(start, 0) : start + BLOCK][:100].split(b"\0")[0].decode("latin-1")
        if not is_of(shard.uids[row], member):
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
        max_open: int = 64,
    ):
        # two windows at least: fewer open shards would be opened again pair by pair
        super().__init__(directory, columns=columns, max_open=max(max_open, 2 * window_shards))
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
        self.compare_digest(shard, entry)
        return shard

    def compare_digest(self, shard: Shard, entry: dict[str, Any]) -> None:
        """Read a tar, where `verify` asks for it and the manifest says what it must be."""
        if self.verify == "sha256" and entry.get("sha256"):
            refuse_other(str(shard.path), None, 0, entry["sha256"], sha256(shard.data))

    def fetched_bytes(self, shards: int) -> int:
        """The most that so many shards take in the cache."""
        return 0

    def index_path(self, number: int) -> Path:
        """The index of a shard, as a local file."""
        return self.directory / f"{self.names[number]}.parquet"

    def read_ahead(self, numbers: Iterable[int]) -> None:
        """That these shards are read next. The operating system reads local files ahead."""


class CachedDataset(LocalDataset):
    """A dataset whose tars are fetched when they are read, and by threads before that.

    url: where its shards lie.
    """

    def __init__(self, directory: Path, *, url: str | None, cache: FileCache, **knobs):
        self.url, self.cache = url, cache
        self.pending: list[Future] = []
        self.pool: ThreadPoolExecutor | None = None
        self.pool_process = 0
        # an open shard takes its room on the disk even when it was removed from the folder
        super().__init__(directory, max_open=1, **knobs)

    def compare_listing(self) -> None:
        fs, _ = filesystem(self.url)
        if "http" in fs.protocol or "https" in fs.protocol:
            return  # a web server need not list, nor list sizes
        entries = retried(self.url, lambda fs, path: fs.ls(path, detail=True))
        self.refuse_sizes({e["name"].rsplit("/", 1)[-1]: e.get("size") for e in entries})

    def fetched_bytes(self, shards: int) -> int:
        return sum(sorted((s["num_bytes"] for s in self.fetched()), reverse=True)[:shards])

    def fetched(self) -> list[dict[str, Any]]:
        """The shards that are fetched."""
        return self.manifest["shards"]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pool": None, "pending": []}

    def files(self, number: int) -> list[Remote]:
        """What to fetch for a shard."""
        entry, folder = self.manifest["shards"][number], self.directory
        tar, index = folder / f"{entry['name']}.tar", folder / f"{entry['name']}.parquet"
        size = entry["num_bytes"] if self.verify != "none" else None
        digest = entry.get("sha256") if self.verify == "sha256" else None
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


class ForeignDataset(CachedDataset):
    """Tars of others: each has a place of its own, and the indexes are in the cache already.

    An index belongs to the bytes it was made of, so those are compared whatever `verify` says.
    """

    def __init__(self, directory: Path, *, cache: FileCache, **knobs):
        super().__init__(directory, url=None, cache=cache, **knobs)

    def compare_listing(self) -> None:
        """read_foreign has just looked at them."""

    def fetched(self) -> list[dict[str, Any]]:
        return [shard for shard in self.manifest["shards"] if "://" in shard["url"]]

    def files(self, number: int) -> list[Remote]:
        entry, tar = self.manifest["shards"][number], self.directory / f"{self.names[number]}.tar"
        if "://" not in entry["url"]:
            return []
        digest = entry["sha256"] if self.verify == "sha256" else None
        return [Remote(entry["url"], tar, entry["num_bytes"], digest)]

    def _open(self, number: int) -> Shard:
        entry = self.manifest["shards"][number]
        refuse_changed(entry, self.directory)
        try:
            shard = super()._open(number)
            refuse_other_members(shard, is_of)
        except ValueError as error:
            raise ValueError(
                f"{entry['url']}: {error}. If the tar is another one now: remove {self.directory} "
                "to index anew"
            ) from error
        if "://" not in entry["url"]:
            self.compare_digest(shard, entry)
        return shard

    def index_path(self, number: int) -> Path:
        return self.directory / f"{self.names[number]}.parquet"


def windows_ahead(order, epoch: int, window: int) -> np.ndarray:
    """The shards of a window and of the next one, in the order they are wanted."""
    return np.concatenate([order.window_of_shards(epoch, w) for w in (window, window + 1)])
