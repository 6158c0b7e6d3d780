"""Hostile and broken input to every reader: a result or a ValueError, soon, in little memory.

make fuzz                      a million inputs
FUZZ_INPUTS=20000 pytest tests/fuzz     what the suite runs
"""

import io
import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from curation.annotate.entries import EntryMatcher
from curation.ingest import Ingest, read_samples
from curation.loose import rows_of
from pipeline.data.foreign import members
from pipeline.data.images import BadImage, ImageTransform
from pipeline.data.tokenizer import BpeTokenizer, clean_caption
from pipeline.evals.labelled_images import LabelledImages
from pipeline.evals.trained import read_checkpoint
from pipeline.formats.checkpoint_file import load_weights
from pipeline.shards import Record, Shard, read_manifest, write_manifest, write_shard
from pipeline.tracking.page import read_rows
from tests.conftest import picture, tar
from tests.fuzz.mutations import TEXT, edited

pytestmark = pytest.mark.timeout(3600)  # a million inputs take half an hour of one core
INPUTS = int(os.environ.get("FUZZ_INPUTS", 20_000))
SECONDS, GIB = 1.0, 1.0
# shares of the inputs: more for what is fast
SHARES = {
    "members": 0.16,
    "samples": 0.08,
    "manifest": 0.15,
    "index": 0.06,
    "labelled": 0.06,
    "image": 0.1,
    "checkpoint": 0.05,
    "torchscript": 0.04,
    "safetensors": 0.06,
    "captions": 0.1,
    "table": 0.06,
    "metrics": 0.08,
}


def inputs(target: str) -> Callable:
    """Settings of one target: its share of the inputs, a second for each, failures shrunk."""
    return settings(
        max_examples=max(10, int(INPUTS * SHARES[target])),
        deadline=1000 * SECONDS,
        derandomize="FUZZ_INPUTS" not in os.environ,  # the suite runs the same ones every time
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def little_memory():
    """The process's peak may not grow by a gibibyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB * 2**20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


PAIRS = tar(
    {
        "1.png": picture(1),
        "1.txt": b"a cat",
        "2.jpg": picture(2, "JPEG"),
        "2.json": json.dumps({"caption": "a dog", "uid": "x", "url": "u"}).encode(),
        "x" * 150 + ".webp": picture(3, "WEBP"),
        "x" * 150 + ".txt": "ein Haus, größer".encode(),
        "evil.pyd": b"\x80\x04.",
    }
)
IMAGES = [picture(n, kind, side=32) for n in (1, 2) for kind in ("PNG", "JPEG", "WEBP")]


def grey16() -> bytes:
    sink = io.BytesIO()
    pixels = np.arange(900, dtype=np.uint16).reshape(30, 30) * 70
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@inputs("members")
@given(data=edited([PAIRS, PAIRS[:2048]]))
def test_tars_of_others(data):
    with suppress(ValueError):
        for name, offset, size in members(data, "x.tar"):
            assert isinstance(name, str) and 0 <= offset <= offset + size <= len(data)


@inputs("samples")
@given(data=edited([PAIRS]))
def test_a_pool_of_tars(place, data):
    (place / "pool.tar").write_bytes(data)
    ingest, kept = Ingest(), 0
    for sample in read_samples(place / "pool.tar"):
        row = ingest.check(sample, Counter())
        assert isinstance(row, (str, dict))
        kept += isinstance(row, dict)
    assert kept <= 3


MANIFEST = json.dumps(
    {
        "format": "pairwright-shards-1",
        "num_samples": 2,
        "shards": [{"name": "shard-000000", "num_samples": 2, "num_bytes": 9, "sha256": "0"}],
        "steps": [{"name": "ingest", "read": 2, "kept": 2, "dropped": {}}],
    }
).encode()


@inputs("manifest")
@given(data=edited([MANIFEST, b"{}", b"[]"]))
def test_manifests(place, data):
    folder = place / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    try:
        found = read_manifest(folder)
    except ValueError:
        return
    for shard in found["shards"]:
        assert (folder / f"{shard['name']}.tar").resolve().parent == folder.resolve()
        assert shard["num_samples"] >= 0


@pytest.fixture(scope="module")
def index(place) -> bytes:
    made = [
        Record(str(n), picture(n), "png", f"thing {n}", {"uid": str(n), "stats": {"a": 0.5}})
        for n in range(3)
    ]
    entry = write_shard(place / "index", "shard-000000", made)
    write_manifest(place / "index", {"num_samples": 3, "shards": [entry], "steps": []})
    return (place / "index" / "shard-000000.parquet").read_bytes()


def test_indices_of_shards(place, index):
    path = place / "index" / "shard-000000.parquet"

    @inputs("index")
    @given(data=edited([index]))
    def one(data):
        path.write_bytes(data)
        with suppress(ValueError):
            shard = Shard(place / "index", "shard-000000")
            for row in range(min(len(shard), 5)):
                assert isinstance(shard.image(row), bytes)
                shard.record(row)

    one()


LABELLED = tar({"1.png": picture(1), "1.cls": b"0", "2.webp": picture(2, "WEBP"), "2.cls": b"1"})


@inputs("labelled")
@given(data=edited([LABELLED]))
def test_labelled_sets(place, data):
    folder = place / "labelled"
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "test" / "0.tar").write_bytes(data)
    with suppress(ValueError):
        for image, label in LabelledImages(folder).samples():
            assert isinstance(image, bytes) and label in (0, 1)


@inputs("image")
@given(data=edited([*IMAGES, grey16()]))
def test_images(data):
    for decode in ("exact", "fast"):
        transform = ImageTransform(image_size=16, decode=decode)
        for read in (
            transform.evaluate,
            lambda image, t=transform: t.train(image, np.random.default_rng(0)),
        ):
            with suppress(BadImage):
                assert read(data).shape == (3, 16, 16)


def checkpoint() -> bytes:
    sink = io.BytesIO()
    torch.save({"state_dict": {"model.a": torch.zeros(3)}, "global_step": 1}, sink)
    return sink.getvalue()


@inputs("checkpoint")
@given(data=edited([checkpoint()]))
def test_checkpoints(place, data):
    (place / "a.ckpt").write_bytes(data)
    for read in (read_checkpoint, load_weights):
        with suppress(ValueError):
            read(place / "a.ckpt")


def torchscript() -> bytes:
    module, sink = torch.nn.Linear(2, 3), io.BytesIO()
    torch.jit.save(torch.jit.script(module), sink)
    return sink.getvalue()


@inputs("torchscript")
@given(data=edited([torchscript()]))
def test_torchscript(place, data):
    (place / "a.pt").write_bytes(data)
    with suppress(ValueError):
        assert all(map(torch.is_tensor, load_weights(place / "a.pt").values()))


@inputs("safetensors")
@given(data=edited([safetensors.torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)})]))
def test_safetensors(place, data):
    (place / "a.safetensors").write_bytes(data)
    with suppress(ValueError):
        assert all(map(torch.is_tensor, load_weights(place / "a.safetensors").values()))


TOKENIZER = BpeTokenizer(path="clip", context_length=16)
ENTRIES = ["red panda", "猫", "a"]
MATCHERS = [EntryMatcher(entries=ENTRIES, rule=rule) for rule in ("metaclip", "metaclip2")]


@inputs("captions")
@given(text=TEXT)
def test_captions(text):
    tokens = TOKENIZER([text])
    assert tokens.shape == (1, 16)
    assert isinstance(clean_caption(text), str)
    for matcher in MATCHERS:
        with suppress(ValueError):  # half a character is refused by name
            (found,) = matcher.match([text])
            assert found == sorted(set(found))


TABLES = {
    "metadata.csv": b'file_name,caption\na.png,"one, two"\nb.png,three\n',
    "metadata.tsv": b"file_name\ttext\na.png\tone\n",
    "metadata.jsonl": b'{"file_name": "a.png", "caption": "one"}\n{"file_name": "b/c.png"}\n',
}


@inputs("table")
@given(data=edited(list(TABLES.values())))
def test_tables_of_captions(place, data):
    folder = place / "tables"
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        (folder / name).write_bytes(data)
        with suppress(ValueError):
            for _, image, caption, problem in rows_of(folder / name, "caption"):
                assert problem or image.resolve().is_relative_to(folder.resolve())
                assert caption is None or isinstance(caption, (str, bytes)) or problem


@inputs("metrics")
@given(data=edited([b'{"step": 1, "samples_seen": 32, "train/loss": 3.5}\n' * 3]))
def test_rows_of_metrics(place, data):
    (place / "metrics.jsonl").write_bytes(data)
    assert all(isinstance(row, dict) for row in read_rows(place / "metrics.jsonl"))
