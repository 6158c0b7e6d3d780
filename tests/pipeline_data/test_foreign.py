"""Tars of others: the same pairs as webdataset reads, nothing unpickled, damage named."""

import io
import json
import os
import pickle
import re
import shlex
import tarfile
from pathlib import Path

import fsspec
import pytest
import torch
import webdataset as wds
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.data.cache import FileCache
from pipeline.data.captions import Mix, Primary
from pipeline.data.foreign import members, read_foreign
from pipeline.data.patterns import expand, is_pattern, locations
from pipeline.shards import Dataset, read_manifest

ROOT = Path(__file__).parents[2]


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
        ("a{0..2}.tar", ["a0.tar", "a1.tar", "a2.tar"]),
        ("a{9..010}.tar", ["a009.tar", "a010.tar"]),
        ("a{099..0100}.tar", ["a0099.tar", "a0100.tar"]),
        ("{x,yy}/{0..1}.tar", ["x/0.tar", "x/1.tar", "yy/0.tar", "yy/1.tar"]),
        ("{../x,../y}/0.tar", ["../x/0.tar", "../y/0.tar"]),
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
        (f"{__file__[:-3]}*.tar::a.tar", r"test_foreign\*\.tar: no tar has such a name"),
        ("https://host/x.tar?sig=abc", "signed URL"),
        ("a{a..c}.tar", r"\{a\.\.c\} is not written out"),
        ("a{00..10..2}.tar", r"\{00\.\.10\.\.2\} is not"),
        ("a{x,{y,z}}.tar", r"\{y,z\} is not"),
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
    with pytest.raises(ValueError, match="commands are not run"):
        make_stream("pipe:cat x.tar")


def write_tar(path, numbers, make_picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            add(archive, f"{number:09d}.png", make_picture(number))
            add(archive, f"{number:09d}.txt", f"caption {number}".encode())
    return path


def test_a_tar_replaced_by_one_of_its_size_is_refused(tmp_path, make_picture, make_stream, take):
    path, cache = tmp_path / "x" / "0.tar", str(tmp_path / "cache")
    size = write_tar(path, range(20), make_picture).stat().st_size
    stream = make_stream(path, cache=cache)
    write_tar(path, reversed(range(20)), make_picture)
    assert path.stat().st_size == size
    for late in (lambda: make_stream(path, cache=cache), lambda: take(stream, 1)):
        with pytest.raises(ValueError, match=r"0\.tar: written after its index.*remove .*indexed-"):
            late()
    for folder in (tmp_path / "cache").glob("indexed-*"):
        folder.rename(tmp_path / "old")
    assert len(take(make_stream(path, cache=cache), 2)) == 2


def test_a_url_of_another_tar_is_refused_when_it_is_fetched_again(
    tmp_path, make_picture, make_stream, take
):
    fs, knobs = fsspec.filesystem("memory"), {"cache": str(tmp_path / "cache")}
    tars = [write_tar(tmp_path / f"{n}.tar", range(n, n + 20), make_picture) for n in (0, 1)]
    fs.pipe_file("memory://again/0.tar", tars[0].read_bytes())
    first = make_stream("memory://again/0.tar", **knobs)
    take(first, 1)
    fs.pipe_file("memory://again/0.tar", tars[1].read_bytes())
    for tar in (tmp_path / "cache").glob("*/*.tar"):
        tar.unlink()
    with pytest.raises(ValueError, match=r"memory://again/0\.tar: .*uid 0/0+ where.*index anew"):
        take(make_stream("memory://again/0.tar", **knobs), 1)
    other = make_stream("memory://again/0.tar", cache=str(tmp_path / "other"))
    assert other.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("remote", [False, True])
def test_digests_of_foreign_tars_are_compared(tmp_path, make_picture, make_stream, take, remote):
    path, fs = write_tar(tmp_path / "0.tar", range(20), make_picture), fsspec.filesystem("memory")
    where = "memory://digest/0.tar" if remote else path
    knobs, before = {"cache": str(tmp_path / "cache")}, path.stat()
    fs.pipe_file("memory://digest/0.tar", path.read_bytes())
    take(make_stream(where, verify="sha256", **knobs), 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fs.pipe_file("memory://digest/0.tar", bytes(data))
    for tar in (tmp_path / "cache").glob("*/*.tar" if remote else "none"):
        tar.unlink()
    with pytest.raises(ValueError, match=r"0\.tar.*sha256"):
        take(make_stream(where, verify="sha256", **knobs), 1)
    take(make_stream(where, **knobs), 1)


def test_the_same_relative_name_in_another_folder_is_another_set(
    tmp_path, make_picture, make_stream, take, monkeypatch
):
    for number in (100, 500):
        write_tar(tmp_path / str(number) / "x" / "0.tar", range(number, number + 8), make_picture)
        monkeypatch.chdir(tmp_path / str(number))
        for name in ("x/0.tar", "x/*.tar"):
            (batch,) = take(make_stream(name, cache=str(tmp_path / "cache")), 1)
            assert sorted(batch["tokens"].flatten().tolist()) == [*range(number, number + 8)]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_damaged_download_is_fetched_again(tmp_path, make_picture, damage):
    data = write_tar(tmp_path / "0.tar", range(8), make_picture).read_bytes()
    fs, cache = fsspec.filesystem("memory"), FileCache(directory=tmp_path / "cache", gib=1)
    fs.pipe_file("memory://cut/0.tar", damage(data))
    with pytest.raises(ValueError, match="copy it again"):
        read_foreign("memory://cut/0.tar", cache)
    fs.pipe_file("memory://cut/0.tar", data)
    assert len(Dataset(read_foreign("memory://cut/0.tar", cache))) == 8


def test_captions_of_our_form_are_read_from_any_tar(tmp_path, make_picture, make_stream, take):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(8):
            bank = [
                {"text": f"caption {number}", "role": "alt"},
                {"text": f"long caption {1000 + number}", "role": "long", "score": 1, "lang": 7},
                {"text": "half \ud83d", "role": "long"},
                {"text": "of no role", "role": ["long"]},
                "no entry",
            ]
            add(archive, f"{number}.png", make_picture(number))
            content = {"caption": f"caption {number}", "captions": bank if number else {"a": 1}}
            add(archive, f"{number}.json", json.dumps(content).encode())
    knobs = {"cache": str(tmp_path / "cache"), "captions": Mix(recaption=1.0)}
    (batch,) = take(make_stream(tmp_path / "0.tar", **knobs), 1)
    assert sorted(batch["tokens"].flatten().tolist()) == [0, *range(1001, 1008)]
    shard = Dataset(next((tmp_path / "cache").glob("indexed-*"))).shard(0)
    assert [c["text"] for c in shard.bank(3)] == ["caption 3", "long caption 1003"]
    assert shard.bank(3)[1]["score"] == 1.0 and shard.bank(3)[1]["lang"] is None


def test_a_sampler_of_recaptions_needs_some(tars, make_stream, take):
    with pytest.raises(ValueError, match=r"no pair of .*captions@data\.captions=primary"):
        make_stream(f"{tars}/0*.tar", cache=str(tars / "cache"), captions=Mix(recaption=0.5))
    take(make_stream(f"{tars}/0*.tar", cache=str(tars / "cache"), captions=Primary()), 1)


def test_half_a_character_is_no_caption(tmp_path, make_picture):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "a.png", make_picture(1))
        add(archive, "a.json", rb'{"caption": "\ud83d"}')
        add(archive, "b.png", make_picture(2))
        add(archive, "b.json", rb'{"caption": "\ud83d\ude00"}')
    folder = read_foreign(str(tmp_path / "0.tar"), FileCache(directory=tmp_path / "c", gib=1))
    assert read_manifest(folder)["steps"][0]["dropped"] == {"no_caption": 1}
    assert Dataset(folder).shard(0).captions == ["\U0001f600"]


def test_repeated_keys_are_counted_and_uids_are_unlike(tmp_path, make_picture, caplog):
    def write(path, keys):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for number, key in enumerate(keys):
                add(archive, f"{key}.png", make_picture(number))
                if key == "c":
                    add(archive, "c.jpg", make_picture(9, "JPEG"))
                add(archive, f"{key}.txt", f"caption {number}".encode())

    write(tmp_path / "x" / "0.tar", "aabac")
    write(tmp_path / "y" / "0.tar", "a")
    cache = FileCache(directory=tmp_path / "cache", gib=1)
    folder = read_foreign(f"{tmp_path}/x/0.tar::{tmp_path}/y/0.tar", cache)
    (step,) = read_manifest(folder)["steps"]
    assert (step["read"], step["kept"], step["dropped"]) == (6, 4, {"repeated_key": 2})
    assert "'jpg': 1" in caplog.text  # a second picture of a pair is not read
    dataset = Dataset(folder)
    assert dataset.shard(0).captions == ["caption 0", "caption 2", "caption 4"]
    uids = [uid for number in (0, 1) for uid in dataset.shard(number).uids]
    assert uids == ["000000-0/a", "000000-0/b", "000000-0/c", "000001-0/a"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_long_name_of_a_folder_is_not_that_of_the_next_file(form):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("long/" * 60)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add(archive, "a.txt", b"a")
    assert [path for path, _, _ in members(sink.getvalue(), "x")] == ["a.txt"]


def test_a_pax_record_that_holds_the_words_of_another_is_not_it():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"comment": "x 9 path=b.txt\n9 path=c\n", "mtime": "1.5"}
        archive.addfile(info)
    assert [path for path, _, _ in members(sink.getvalue(), "x")] == ["a.txt"]


def test_a_folder_of_tars_says_how_to_train_on_it(tars, make_stream):
    with pytest.raises(ValueError, match=r"\"data\.shards='.*/\*\.tar'\" data\.cache="):
        make_stream(tars)


def test_a_cache_that_is_a_file_is_named(tars, make_stream):
    for path in (tars / "bad.tar", tars / "bad.tar" / "cache"):
        with pytest.raises(ValueError, match=r"data\.cache=.*bad\.tar.*name a folder"):
            make_stream(f"{tars}/0*.tar", cache=str(path))


def test_the_documented_commands_are_hydras():
    text = (ROOT / "docs/training/data.md").read_text() + (
        ROOT / "conf/data/shards.yaml"
    ).read_text()
    typed = re.findall(r"    python -m pipeline\.train \.\.\. (.*?)(?:    .*)?\n", text)
    typed += re.findall(r"tars: (\"data\.shards=.*)", text)
    overrides = [override for line in typed for override in shlex.split(line)]
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [one.value() for one in parsed if one.key_or_group == "data.shards"]
    assert len(typed) == 5 and sum("{00000..01242}.tar" in str(value) for value in values) == 2
