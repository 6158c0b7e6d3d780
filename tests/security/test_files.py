"""Files of strangers: nothing in them is run, none reaches out of its folder, none grows."""

import ast
import json
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from curation.ingest import Ingest, pool_files, read_samples
from curation.loose import rows_of
from pipeline.data.foreign import build_index
from pipeline.data.images import BadImage, ImageTransform
from pipeline.evals.labelled_images import LabelledImages
from pipeline.evals.trained import read_checkpoint
from pipeline.formats.checkpoint_file import load_weights
from pipeline.shards import FORMAT, read_manifest
from tests.conftest import picture, tar

SOURCES = [
    path
    for folder in ("pipeline", "curation", "benchmarks", "examples")
    for path in sorted((Path(__file__).resolve().parents[2] / folder).rglob("*.py"))
]


class Hostile:
    """Unpickled anywhere, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, lambda c, p: Path(p).write_bytes(pickle.dumps(c))])
def test_a_pickle_in_a_checkpoint_is_not_run(name, write, tmp_path):
    write({"state_dict": {"model.a": Hostile(tmp_path / "ran")}}, tmp_path / name)
    for read in (read_checkpoint, load_weights):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / name, weights_only=False) if write is torch.save else pickle.loads(
        (tmp_path / name).read_bytes()
    )
    assert (tmp_path / "ran").exists()  # it would have been


def torchscript(path: Path, content: bytes | None = None, compress: int = zipfile.ZIP_STORED):
    """An archive of TorchScript's form, with data.pkl replaced."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in members.items():
            archive.writestr(name, content if content and name.endswith("/data.pkl") else data)


class Writing(torch.nn.Module):
    """TorchScript that runs when it is loaded, as torch.jit.load does."""

    @torch.jit.export
    def __getstate__(self):
        return (torch.zeros(2), self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.training = state[1]
        assert state[0].sum() > 0, "the archive's own code was run"


def test_the_code_of_a_torchscript_archive_is_not_run(tmp_path):
    torchscript(tmp_path / "a.pt", pickle.dumps(Hostile(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match=r"a\.pt .*asks for .*open"):
        load_weights(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
    torch.jit.script(Writing()).save(str(tmp_path / "b.pt"))
    with pytest.raises(torch.jit.Error, match="own code was run"):
        torch.jit.load(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt is no readable"):
        load_weights(tmp_path / "b.pt")


def test_a_torchscript_archive_gives_what_torch_reads(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).half()
    module[0].weight.data = torch.arange(6.0).half().view(2, 3).T  # strides of its own
    torch.jit.script(module).save(str(tmp_path / "a.pt"))
    theirs, ours = module.state_dict(), load_weights(tmp_path / "a.pt")
    assert {n: t for n, t in ours.items() if n in theirs}.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype


def test_a_torchscript_archive_cannot_point_out_of_its_storage_or_grow(tmp_path):
    torchscript(tmp_path / "a.pt", compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        load_weights(tmp_path / "a.pt")
    torchscript(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        content = archive.read("a/data.pkl")
    wrong = content.replace(b"K\x03K\x02", b"K\x7fK\x02")
    assert wrong != content
    torchscript(tmp_path / "a.pt", wrong)
    with pytest.raises(ValueError, match=r"a\.pt is no readable"):
        load_weights(tmp_path / "a.pt")


def test_members_that_are_pickles_are_never_read(tmp_path):
    hostile = pickle.dumps(Hostile(tmp_path / "ran"))
    names = ("1.pyd", "1.pkl", "1.pickle", "1.pt", "1.npy", "1.cls.pyd")
    data = tar({"1.png": picture(1), "1.txt": b"a cat", **dict.fromkeys(names, hostile)})
    assert build_index(data, "x.tar").num_rows == 1
    (tmp_path / "x.tar").write_bytes(data)
    (sample,) = read_samples(tmp_path / "x.tar")
    assert Ingest().check(sample, Counter())["caption"] == "a cat"
    assert not (tmp_path / "ran").exists()


FORBIDDEN = {
    *("pickle.load", "pickle.loads", "torch.jit.load", "yaml.load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "eval", "exec", "marshal.loads", "shelve.open", "extractall"),
}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            knobs = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield f"{path}:{node.lineno}: {name}", name, knobs


def test_nothing_in_the_code_could_run_a_file():
    assert len(SOURCES) > 100
    for where, name, knobs in (call for path in SOURCES for call in calls(path)):
        assert name not in FORBIDDEN and not name.endswith(".extractall"), where
        if name == "torch.load":
            assert knobs.get("weights_only") == "True", where
        if name == "np.load":
            assert knobs.get("allow_pickle") == "False", where
        assert knobs.get("shell", "False") == "False", where
        assert knobs.get("trust_remote_code", "False") == "False", where


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "a/../../b", "a\0b", ""])
def test_a_name_reaches_no_file_outside(name, tmp_path):
    """A uid is a file name in the shards, a manifest's name one beside it, a table's one below."""
    info = json.dumps({"uid": name, "caption": "a cat"}).encode()
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "x.tar").write_bytes(tar({f"{name or 'x'}.png": picture(1), f"{name}.json": info}))
    for file in pool_files(str(pool)):
        for sample in read_samples(file):
            row = Ingest().check(sample, Counter())
            if isinstance(row, dict):
                assert row["uid"].isalnum()
    content = {"format": FORMAT, "steps": [], "shards": [{"name": name, "num_samples": 1}]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no name of a shard"):
        read_manifest(tmp_path)
    (pool / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "a"}))
    (tmp_path / "escaped.png").write_bytes(picture(2))
    for _, image, _, problem in rows_of(pool / "metadata.jsonl", "caption"):
        assert problem or image.resolve().is_relative_to(pool.resolve())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join((chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


ZEROS = zlib.compress(bytes(300_000_000), 9)  # 300 kB that say 300 MB
BOMBS = {
    "pixels": png(60_000, 60_000, chunk(b"IDAT", ZEROS)),
    "more pixels than the header": png(8, 8, chunk(b"IDAT", ZEROS)),
    "text": png(8, 8, chunk(b"zTXt", b"a\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(200)))),
    "profile": png(8, 8, chunk(b"iCCP", b"a\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(9)))),
    "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\0\x02\x11\1\x03\x11\1",
}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@pytest.mark.parametrize("name", list(BOMBS))
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_a_bomb_is_a_bad_image_or_a_small_one(name, decode):
    before, transform = peak(), ImageTransform(image_size=16, decode=decode)
    for read in (
        transform.evaluate,
        lambda data: transform.train(data, np.random.default_rng(0)),
    ):
        with suppress(BadImage):
            assert read(BOMBS[name]).shape == (3, 16, 16)
    assert peak() - before < 100  # MiB


def test_a_sparse_member_does_not_grow(tmp_path):
    """GNU tar writes a hole as its length: here 4 GiB in 512 bytes."""
    info = tarfile.TarInfo("1.png")
    info.size, info.type = 0, b"S"
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (4 << 30)  # the real size
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    data = bytes(block) + tar({"1.txt": b"a cat", "1.cls": b"0"})
    (tmp_path / "x.tar").write_bytes(data)
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert next(iter(archive)).size == 4 << 30  # what a reader would allocate
    before = peak()
    samples = [s for s in read_samples(tmp_path / "x.tar") if s.key]
    assert all(sample.image is None for sample in samples)
    (tmp_path / "classnames.txt").write_text("cat\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "test" / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match="has only its cls"):
        list(LabelledImages(tmp_path).samples())
    assert peak() - before < 100


def test_a_parquet_pool_with_a_pickled_column_is_data(tmp_path, parquet_pool):
    pool = parquet_pool(4, files=1)
    (file,) = pool.glob("*.parquet")
    table = pq.read_table(file)
    hostile = pickle.dumps(Hostile(tmp_path / "ran"))
    table = table.append_column("extra", [[hostile] * 4])
    schema = table.schema.with_metadata({b"pandas": b"{}", b"PANDAS_ATTRS": hostile})
    pq.write_table(table.cast(schema), file)
    assert len(list(read_samples(pool_files(str(pool))[0]))) == 4
    assert not (tmp_path / "ran").exists()
