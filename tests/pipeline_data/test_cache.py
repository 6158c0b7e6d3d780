"""The bounded folder: what is claimed, read lately or in use keeps its room."""

import os
import subprocess
import sys
import threading

import fsspec
import pytest

from pipeline.data import cache as module
from pipeline.data.cache import FileCache, Remote

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
