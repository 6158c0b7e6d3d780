"""The bounded folder: what is claimed, read lately or in use keeps its room."""

import os
import subprocess
import sys
import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.data import cache as module
from pipeline.data.cache import FileCache, Remote, retried

KIB = 1 / 2**20  # of a GiB


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.15)


@pytest.fixture
def store(tmp_path):
    """fetch(cache, name) brings 1 KiB of the store into a folder of the cache."""
    fs = fsspec.filesystem("memory")
    for name in "abcdef":
        fs.pipe_file(f"memory://store/{name}.tar", name.encode() * 1024)

    def fetch(cache, name):
        path = cache.folder("set") / f"{name}.tar"
        with cache.locked(path):
            cache.fetch([Remote(f"memory://store/{name}.tar", path)], path)
        return path

    yield fetch
    fs.store.clear()


def held(cache):
    return {path.stem for path in cache.directory.glob("*/*.tar")}


def test_what_was_read_last_stays(store, tmp_path):
    cache = FileCache(directory=tmp_path, gib=3 * KIB)
    for number, name in enumerate("abc"):
        os.utime(store(cache, name), ns=(number, number))
    store(cache, "a")  # read once more
    store(cache, "d")
    assert held(cache) == {"a", "c", "d"}


def test_what_is_being_written_counts(store, tmp_path):
    cache = FileCache(directory=tmp_path, gib=3 * KIB)
    path = cache.folder("set") / "x.tar"
    with cache.room(path, 2000):
        store(cache, "a")
        other = path.with_name("b.tar")
        full = pytest.raises(ValueError, match="is full of shards that are being read")
        with full, cache.locked(path.with_name("a.tar")):
            cache.fetch([Remote("memory://store/b.tar", other)], other)
    store(cache, "b")
    assert held(cache) == {"a", "b"} and not list(tmp_path.glob(".claims/*"))


def test_whoever_waits_gets_room_when_another_is_done(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 30)
    cache = FileCache(directory=tmp_path, gib=2 * KIB)
    waiter = threading.Thread(target=store, args=(cache, "a"))
    with cache.room(cache.folder("set") / "x.tar", 2000):
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive() and held(cache) == set()
    waiter.join()
    assert held(cache) == {"a"}


def test_a_killed_process_leaves_no_claim(store, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from pipeline.data.cache import FileCache\n"
        "cache = FileCache(directory=sys.argv[1], gib=2 / 2**20)\n"
        "with cache.room(Path('set/x.tar'), 2000): os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 9 and list(tmp_path.glob(".claims/*"))
    cache = FileCache(directory=tmp_path, gib=2 * KIB)
    for name in "ab":
        store(cache, name)
    assert held(cache) == {"a", "b"}


def test_one_shard_may_be_larger_than_all_room(store, tmp_path):
    with pytest.raises(ValueError, match="one shard has"):
        store(FileCache(directory=tmp_path, gib=0.5 * KIB), "a")


def test_what_killed_fetches_left_is_removed(store, tmp_path):
    cache = FileCache(directory=tmp_path, gib=2 * KIB)
    folder = cache.folder("set")
    code = (
        "import os, sys; from pathlib import Path; from pipeline.shards import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file: file.write(b'x' * 4096); os._exit(9)"
    )
    for name in ("a.tar", "b.tar", "b.parquet", "b.c.tar"):
        subprocess.run([sys.executable, "-c", code, str(folder / name)], check=False)
    assert len(list(folder.glob(".*.part"))) == 4
    with cache.locked(folder / "b.c.tar"):  # as if its writer lived
        store(cache, "a")
    (left,) = folder.glob(".*.part")
    assert left.name.startswith(".b.c.tar.") and held(cache) == {"a"}


class Odd(Exception):
    """As a store's library has it: of no kind that we know."""


class Http(MemoryFileSystem):
    protocol = "http"


def failing(*errors):
    left = list(errors)

    def action(fs, path):
        if left:
            raise left.pop(0)
        return path

    return action


def caused(status):
    error, error.__cause__ = FileNotFoundError("http://x/y"), Odd(f"says {status}")
    error.__cause__.status = status
    return error


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(module, "filesystem", lambda url: (Http(), "y"))


def test_errors_of_any_store_are_asked_again_and_then_named(hurried):
    assert retried("http://x/y", failing(Odd("503"), caused(503))) == "y"
    with pytest.raises(ValueError, match=r"http://x/y: cannot be read \(says 503\)"):
        retried("http://x/y", failing(*[caused(503) for _ in range(3)]))
    with pytest.raises(ValueError, match=r"http://x/y: cannot be read \(Odd\)"):
        retried("http://x/y", failing(Odd(), Odd(), Odd()))


def test_what_a_web_server_does_not_have_is_missing(hurried):
    for error in (caused(404), FileNotFoundError("y")):
        with pytest.raises(ValueError, match="http://x/y: missing"):
            retried("http://x/y", failing(error))


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_room_is_a_number_above_nothing(tmp_path, gib):
    with pytest.raises(ValueError, match="cache_gib"):
        FileCache(directory=tmp_path, gib=gib)
