"""Tars of others: the same pairs as webdataset reads, nothing unpickled, damage named."""

import io
import json
import os
import pickle
import tarfile

import fsspec
import pytest
import torch
import webdataset as wds

from pipeline.data.cache import FileCache
from pipeline.data.foreign import expand, is_pattern, locations, members, read_foreign
from pipeline.shards import Dataset, read_manifest


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path, make_picture):
    """Two tars as img2dataset writes them, and what in them must be dropped."""
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for n in range(12):
                number = 100 * shard + n
                writer.write(
                    {
                        "__key__": f"{number:09d}",
                        "jpg" if n % 2 else "webp": make_picture(
                            number, "JPEG" if n % 2 else "WEBP"
                        ),
                        "txt": f"caption {number}",
                        "json": {"url": "x", "caption": f"caption {number}"},
                        "cls": 3,
                    }
                )
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as archive:
        add(archive, "a.jpg", make_picture(1, "JPEG"))
        add(archive, "a.pyd", pickle.dumps(Bomb(str(tmp_path / "exploded"))))
        add(archive, "a.pkl", pickle.dumps(Bomb(str(tmp_path / "exploded"))))
        add(archive, "a.txt", b"caption 901")
        add(archive, "b.txt", b"an image is missing")
        add(archive, "c.jpg", make_picture(2, "JPEG"))
        add(archive, "d.jpg", make_picture(3, "JPEG"))
        add(archive, "d.txt", b"\xff\xfe not text")
        add(archive, "d.json", b'{"caption": "caption 902"}')
        add(archive, "e.jpg", make_picture(4, "JPEG"))
        add(archive, "e.txt", b"  ")
        add(archive, "e.json", b'["caption"]')
        add(archive, "f.JPEG", make_picture(5, "JPEG"))
        add(archive, "f.txt", b"x" * (2 << 20))  # longer than any caption
        add(archive, "f.json", b'{"caption": "caption 903"}')
    return tmp_path


def test_webdataset_reads_the_same_pairs(tars, tmp_path):
    pattern = f"{tars}/{{00000..00001}}.tar"
    folder = read_foreign(pattern, FileCache(directory=tmp_path / "cache", gib=1))
    dataset, urls = Dataset(folder), [str(tars / f"{n:05d}.tar") for n in range(2)]
    theirs = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(dataset) == len(theirs) == 24
    for number, sample in enumerate(theirs):
        shard, row = dataset.locate(number)
        assert shard.image(row) == sample.get("jpg", sample.get("webp"))
        assert shard.captions[row] == sample["txt"].decode()
        assert shard.uids[row] == f"{number // 12:05d}/{sample['__key__']}"
        record = shard.record(row)
        assert record.extension in sample and record.info == json.loads(sample["json"])


def test_a_stream_of_a_pattern_trains_on_every_pair_and_resumes(tars, make_stream, take):
    knobs = {"cache": str(tars / "cache")}
    pattern = f"{tars}/*.tar"
    stream = make_stream(pattern, batch=9, **knobs)
    whole = take(stream, 6)
    numbers = torch.cat([b["tokens"] for b in whole]).flatten().tolist()
    expected = [*range(12), *range(100, 112), 901, 902, 903]
    assert sorted(numbers[:27]) == sorted(numbers[27:]) == expected
    again = make_stream(pattern, batch=9, workers=2, **knobs)
    again.load_state_dict(stream.state_at(36))
    assert [b["uids"] for b in take(again, 2)] == [b["uids"] for b in whole[4:]]


def test_pickles_are_never_read_and_what_is_dropped_is_counted(tars, caplog):
    folder = read_foreign(f"{tars}/bad.tar", FileCache(directory=tars / "cache", gib=1))
    step = read_manifest(folder)["steps"][0]
    assert step == {
        "name": "index",
        "read": 6,
        "kept": 3,
        "dropped": {"no_image": 1, "no_caption": 2},
    }
    assert "'pyd': 1" in caplog.text and "'pkl': 1" in caplog.text
    dataset = Dataset(folder)
    for row in range(3):
        dataset.shard(0).image(row)
    assert not (tars / "exploded").exists()


def test_the_index_is_made_once(tars, monkeypatch):
    cache = FileCache(directory=tars / "cache", gib=1)
    folder = read_foreign(f"{tars}/*.tar", cache)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    (folder / "manifest.json").unlink()  # as if killed before the end
    (folder / "000001-00001.parquet").unlink()
    assert read_foreign(f"{tars}/*.tar", cache) == folder
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed == {"manifest.json", "000001-00001.parquet"}


def test_urls_are_fetched_indexed_and_dropped_again(tars, make_stream, take):
    fs = fsspec.filesystem("memory")
    for path in tars.glob("0*.tar"):
        fs.pipe_file(f"memory://wds/{path.name}", path.read_bytes())
    largest = max(path.stat().st_size for path in tars.glob("0*.tar"))
    knobs = {"window_shards": 1, "cache_gib": 2.5 * largest / 2**30}
    ours = take(make_stream(f"{tars}/0*.tar", cache=str(tars / "a"), window_shards=1), 5)
    stream = make_stream("memory://wds/{00000..00001}.tar", cache=str(tars / "b"), **knobs)
    theirs = take(stream, 5)
    assert [b["uids"] for b in theirs] == [b["uids"] for b in ours]
    for tar in (tars / "b").glob("*/*.tar"):
        tar.unlink()  # another dataset needed the room: the index stays, the tar is fetched again
    again = make_stream("memory://wds/*.tar", cache=str(tars / "b"), **knobs)
    assert [b["uids"] for b in take(again, 5)] == [b["uids"] for b in ours]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_form_are_understood(form):
    names = ["a.jpg", "dir/" * 20 + "b.txt", "é" * 40 + ".txt", "x" * 90 + "/" + "y" * 80 + ".json"]
    if form != tarfile.USTAR_FORMAT:
        names.append("long" * 80 + ".txt")
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            add(archive, name, bytes([number]) * (511 + number))
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as archive:
        wanted = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert list(members(sink.getvalue(), "x")) == wanted and len(wanted) == len(names)


def test_gnu_headers_have_no_prefix():
    """GNU keeps times where POSIX has the prefix of a long name."""
    info = tarfile.TarInfo("a.txt")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[345:357] = b"14700000000\0"
    data = bytes(header) + bytes(1024)
    assert [path for path, _, _ in members(data, "x")] == ["a.txt"]


def test_a_tar_that_is_cut_or_none_is_named(tars):
    path = tars / "00001.tar"
    data = path.read_bytes()
    for number, (damage, words) in enumerate(
        [
            (data[: len(data) // 2], r"00001\.tar: ends at byte \d+ without"),
            (data[: len(data) // 3], r"00001\.tar: ends at byte \d+ without"),
            (data[:124] + b"-0001000000\0" + data[136:], r"00001\.tar: ends at byte"),
            (b"", r"00001\.tar: 0 bytes"),
            (b"<html>not found</html>" * 100, r"00001\.tar: no tar header"),
        ]
    ):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=words):
            read_foreign(f"{tars}/0*.tar", FileCache(directory=tars / f"c{number}", gib=1))
    path.unlink()
    with pytest.raises(ValueError, match=r"00001\.tar: missing"):
        read_foreign(f"{tars}/{{00000,00001}}.tar", FileCache(directory=tars / "c", gib=1))


def test_a_tar_that_changed_or_went_is_refused(tars):
    cache, path = FileCache(directory=tars / "cache", gib=1), tars / "00001.tar"
    read_foreign(f"{tars}/0*.tar", cache)
    with open(path, "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"00001\.tar: \d+ bytes, its index was made of"):
        read_foreign(f"{tars}/0*.tar", cache)
    path.unlink()
    with pytest.raises(ValueError, match=r"00001\.tar"):
        read_foreign(f"{tars}/{{00000..00001}}.tar", cache)


def test_a_tar_of_failures_alone_holds_no_pairs(tars, make_stream, take):
    with tarfile.open(tars / "00002.tar", "w"):
        pass
    stream = make_stream(f"{tars}/{{00000..00002}}.tar", cache=str(tars / "cache"))
    assert len(stream) == 24
    assert len({uid for b in take(stream, 3) for uid in b["uids"]}) == 24


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("a{8..10}.tar", ["a8.tar", "a9.tar", "a10.tar"]),
        ("{x,yy}/{0..1}.tar", ["x/0.tar", "x/1.tar", "yy/0.tar", "yy/1.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_written_out(pattern, names):
    assert expand(pattern) == names == wds.shardlists.expand_urls(pattern)


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("pipe:cat x.tar", "commands are not run"),
        ("pipe:aws s3 cp s3://b/x.tar -", "commands are not run"),
        ("x.tar.gz", "unpack it"),
        ("a.tar::b.tgz", "unpack it"),
        ("nowhere/*.tar", "no tar has such a name"),
        ("a{3..1}.tar", "counts down"),
    ],
)
def test_names_that_cannot_be_read_are_refused(shards, words):
    assert is_pattern(shards)
    with pytest.raises(ValueError, match=words):
        locations(shards)


def test_a_pattern_needs_a_cache(tars, make_stream):
    with pytest.raises(ValueError, match="set data.cache"):
        make_stream(f"{tars}/0*.tar")
