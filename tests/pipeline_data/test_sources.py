"""Shards from directories and URLs: the same pairs, a bounded cache, damage named."""

import gc
import json
import threading
import weakref
from collections import Counter
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.data import cache as cache_module
from pipeline.data.cache import FileCache
from pipeline.data.sources import open_dataset
from pipeline.shards import read_manifest, write_json


class Bucket(MemoryFileSystem):
    """An object store that counts what is opened and can fail."""

    protocol = "bucket"
    opened: ClassVar[Counter] = Counter()
    failures: ClassVar[Counter] = Counter()

    def _open(self, path, mode="rb", **knobs):
        name = path.rsplit("/", 1)[-1]
        if "r" in mode:
            Bucket.opened[name] += 1
            if Bucket.failures[name]:
                Bucket.failures[name] -= 1
                raise OSError("connection reset")
        return super()._open(path, mode, **knobs)

    def cat_file(self, path, **knobs):
        with self.open(path) as file:
            return file.read()


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(cache_module, "PAUSE_SECONDS", 0.001)
    Bucket.opened.clear()
    Bucket.failures.clear()
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset):
    return write_dataset(tmp_path_factory.mktemp("local"), [9, 12, 5, 11, 8, 10])


def upload(folder, url="bucket://pool/shards", without=()):
    fs = Bucket()
    for path in folder.iterdir():
        if path.name not in without:
            fs.pipe_file(f"{url}/{path.name}", path.read_bytes())
    return url


def gib(folder, shards):
    """A cache that holds so many of the largest shards, with their indexes."""
    sizes = sorted(
        p.stat().st_size + p.with_suffix(".parquet").stat().st_size for p in folder.glob("*.tar")
    )
    return sum(sizes[-shards:]) / 2**30


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_gives_the_same_batches_in_a_bounded_folder(
    dataset, tmp_path, make_stream, take, workers
):
    limit = gib(dataset, 3)
    knobs = {"window_shards": 1, "workers": workers}
    ours = take(make_stream(dataset, **knobs), 14)
    remote = make_stream(upload(dataset), cache=str(tmp_path), cache_gib=limit, **knobs)
    for batch, wanted in zip(take(remote, 14), ours, strict=True):
        assert batch["uids"] == wanted["uids"]
        assert torch.equal(batch["images"], wanted["images"])
        files = list(tmp_path.glob("*/*.tar")) + list(tmp_path.glob("*/*.parquet"))
        if workers == 0:
            assert sum(f.stat().st_size for f in files if f.exists()) <= limit * 2**30


def test_a_shard_is_fetched_once_whoever_asks(dataset, tmp_path):
    url, files = upload(dataset), FileCache(directory=tmp_path, gib=1)
    readers = [open_dataset(url, window_shards=2, cache=files) for _ in range(4)]
    lengths = []

    def read(reader):
        for number in range(6):
            lengths.append(len(reader.shard(number)))

    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(lengths) == Counter([9, 12, 5, 11, 8, 10] * 4)
    tars = {name: n for name, n in Bucket.opened.items() if name.endswith(".tar")}
    assert tars == {f"shard-{n:06d}.tar": 1 for n in range(6)}


def test_the_window_and_the_next_one_are_fetched_ahead(dataset, tmp_path, make_stream, take):
    stream = make_stream(upload(dataset), batch=4, cache=str(tmp_path), window_shards=2)
    take(stream, 1)
    part = stream.parts[0]
    for future in part.dataset.pending:
        future.result()
    wanted = part.order.epoch(0)[0][:4]
    names = {path.stem for path in tmp_path.glob("*/*.tar")}
    assert names == {f"shard-{n:06d}" for n in wanted}


def test_the_longest_unread_shard_makes_room(dataset, tmp_path):
    url = upload(dataset)
    files = FileCache(directory=tmp_path, gib=gib(dataset, 3))
    reader = open_dataset(url, window_shards=1, cache=files)
    first = reader.shard(0)
    for number in (1, 2, 3, 4):
        reader.shard(number)
    held = {path.stem for path in tmp_path.glob("*/*.tar")}
    assert "shard-000004" in held and "shard-000000" not in held
    assert not list(tmp_path.glob("*/shard-000000.parquet"))
    assert first.image(3).startswith(b"\x89PNG")  # what is open stays readable


def test_a_failing_store_is_asked_again_and_then_named(dataset, tmp_path):
    url, files = upload(dataset), FileCache(directory=tmp_path, gib=1)
    Bucket.failures["shard-000001.tar"] = 2
    reader = open_dataset(url, window_shards=2, cache=files)
    assert len(reader.shard(1)) == 12
    Bucket.failures["shard-000002.tar"] = 3
    with pytest.raises(ValueError, match=r"shard-000002\.tar: cannot be read \(connection reset"):
        reader.shard(2)


def test_a_new_manifest_is_another_dataset(dataset, tmp_path, write_dataset):
    files = FileCache(directory=tmp_path / "cache", gib=1)
    url = upload(dataset)
    first = open_dataset(url, window_shards=2, cache=files)
    uid = first.shard(0).uids[0]
    upload(write_dataset(tmp_path / "other", [9, 12, 5, 11, 8, 10], first=500), url)
    second = open_dataset(url, window_shards=2, cache=files)
    assert second.shard(0).uids[0] != uid and second.directory != first.directory


def copied(dataset, folder, change):
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def flip_a_byte(folder):
    path = folder / "shard-000003.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "shard-000003.tar").unlink(), r"shard-000003\.tar is missing"),
        (lambda f: (f / "shard-000003.parquet").unlink(), r"shard-000003\.parquet is missing"),
        (
            lambda f: (f / "shard-000003.tar").write_bytes(b"x" * 9),
            r"shard-000003\.tar has 9 bytes, the manifest says \d+",
        ),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_what_is_missing_or_of_another_size_is_named_at_the_start(
    dataset, tmp_path, make_stream, change, words, remote
):
    folder = copied(dataset, tmp_path / "copy", change)
    where = upload(folder) if remote else folder
    with pytest.raises(ValueError, match=words):
        make_stream(where, cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("remote", [False, True])
def test_a_wrong_digest_is_refused_where_it_is_asked_for(
    dataset, tmp_path, make_stream, take, remote
):
    folder = copied(dataset, tmp_path / "copy", flip_a_byte)
    where = upload(folder) if remote else folder
    with pytest.raises(ValueError, match=r"shard-000003.*sha256.*the manifest says"):
        take(make_stream(where, cache=str(tmp_path / "a"), verify="sha256"), 7)
    assert not list(tmp_path.glob("a/*/shard-000003.tar"))
    take(make_stream(where, cache=str(tmp_path / "b"), verify="size"), 7)
    take(make_stream(dataset, verify="sha256"), 7)


def test_a_shard_that_vanishes_later_is_named(dataset, tmp_path, make_stream, take):
    url = upload(dataset)
    stream = make_stream(url, cache=str(tmp_path))
    Bucket().rm_file(f"{url}/shard-000002.tar")
    with pytest.raises(ValueError, match=r"shard-000002\.tar: missing"):
        take(stream, 7)


@pytest.mark.parametrize(
    ("where", "knobs", "words"),
    [
        ("bucket://nothing/here", {}, "nothing/here: no manifest.json"),
        ("bucket://pool/shards", {"cache": None}, "set data.cache to a folder"),
        ("bucket://pool/shards", {"cache_gib": 1e-4}, "data.cache_gib=0.0001: two windows of 2"),
        ("bucket://pool/shards", {"cache_gib": 0}, "cache_gib 0"),
        ("bucket://pool/shards", {"verify": "md5"}, "verify 'md5'"),
        ("nosuch://pool/shards", {}, "nosuch"),
    ],
)
def test_settings_that_cannot_work_are_named(dataset, tmp_path, make_stream, where, knobs, words):
    upload(dataset)
    with pytest.raises(ValueError, match=words):
        make_stream(where, **{"cache": str(tmp_path), **knobs})


def test_file_urls_are_directories(dataset, make_stream, take):
    one, two = (take(make_stream(w), 2) for w in (dataset, f"file://{dataset}"))
    assert [b["uids"] for b in one] == [b["uids"] for b in two]


def test_late_balance_reads_the_indexes_of_a_url(dataset, tmp_path, make_stream):
    with pytest.raises(ValueError, match="inclusion_probability"):
        make_stream(upload(dataset), cache=str(tmp_path), late_balance=True)
    assert len(list(tmp_path.glob("*/*.parquet"))) == 1  # fetched one by one


def test_an_index_with_other_rows_than_the_manifest_is_refused(dataset, tmp_path, make_stream):
    folder = copied(dataset, tmp_path / "copy", lambda f: None)
    manifest = read_manifest(folder)
    manifest["shards"][0]["num_samples"] -= 1
    write_json(folder / "manifest.json", manifest)
    assert json.loads((folder / "manifest.json").read_text())["format"]
    with pytest.raises(ValueError, match=r"shard-000000.*9 records, the manifest says 8"):
        open_dataset(str(folder), window_shards=2).shard(0)


def test_shards_that_are_not_read_any_more_give_their_room_back(dataset, tmp_path):
    files = FileCache(directory=tmp_path, gib=1)
    reader = open_dataset(upload(dataset), window_shards=2, cache=files)
    shards = [weakref.ref(reader.shard(number)) for number in range(6)]
    gc.collect()
    assert [shard() is not None for shard in shards] == [False, False, True, True, True, True]
    local = open_dataset(str(dataset), window_shards=2)
    assert local.shard.cache_info().maxsize == 64


def test_the_windows_of_all_datasets_must_fit_together(dataset, tmp_path, make_stream):
    url, limit = upload(dataset), gib(dataset, 3)
    make_stream(url, cache=str(tmp_path), cache_gib=limit, window_shards=1)
    mixture = [{"shards": url, "weight": 1}, {"shards": url, "weight": 1}]
    with pytest.raises(ValueError, match="two windows of 1 shards of each of 2 datasets"):
        make_stream(None, mixture=mixture, cache=str(tmp_path), cache_gib=limit, window_shards=1)


def test_a_failing_store_is_asked_again_for_the_manifest(dataset, tmp_path):
    url, files = upload(dataset), FileCache(directory=tmp_path, gib=1)
    Bucket.failures["manifest.json"] = 2
    assert len(open_dataset(url, window_shards=2, cache=files)) == 55
    Bucket.failures["manifest.json"] = 3
    with pytest.raises(ValueError, match=r"bucket://pool/shards: cannot be read \(connection"):
        open_dataset(url, window_shards=2, cache=files)
