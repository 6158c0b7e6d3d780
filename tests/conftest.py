"""Fixtures of the whole suite."""

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.data.tokenizer import train_bpe
from pipeline.shards import Record, content_uid, write_manifest, write_shard

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Tests share two cores; one torch thread is faster here and bit-reproducible."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def picture(number: int, kind: str = "PNG", side: int = 24) -> bytes:
    """A small image that depends on `number` alone."""
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    """A plain tar of these members."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.fixture(scope="session")
def make_picture():
    """picture(number, kind, side) -> bytes."""
    return picture


@pytest.fixture
def parquet_pool(tmp_path: Path):
    """make(num_pairs, files) -> a pool directory in the Hugging Face image layout."""

    def make(num_pairs: int = 40, files: int = 2, name: str = "pool", words: str = "thing") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {
                "image": {"bytes": picture(n), "path": f"{n}.png"},
                "caption": f"{words} number {n % 7} in a row of {n}",
                "url": f"https://img.example.org/{n}.png",
            }
            for n in range(num_pairs)
        ]
        for number in range(files):
            table = pa.Table.from_pylist(rows[number::files])
            pq.write_table(table, folder / f"part-{number}.parquet")
        return folder

    return make


@pytest.fixture
def read_json():
    """read(path) -> parsed JSON."""
    return lambda path: json.loads(Path(path).read_text())


@pytest.fixture(scope="session")
def data(tmp_path_factory, make_picture):
    """A folder with `shards`, 80 pairs, and a `tokenizer` of 600 pieces."""
    folder = tmp_path_factory.mktemp("data")
    made = []
    for number in range(80):
        image, caption = make_picture(number), f"thing number {number}"
        uid = content_uid(image, caption)
        made.append(Record(uid, image, "png", caption, {"uid": uid}))
    entry = write_shard(folder / "shards", "shard-000000", made)
    step = {"name": "ingest", "read": 80, "kept": 80, "dropped": {}}
    write_manifest(folder / "shards", {"num_samples": 80, "shards": [entry], "steps": [step]})
    train_bpe((r.caption for r in made), vocab_size=600, directory=folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def command():
    """command(data, runs, name, *overrides): 20 steps of 32 pairs of a micro model."""
    return lambda data, runs, name, *overrides: [
        sys.executable,
        "-m",
        "pipeline.train",
        "recipe=emoji",
        "debug=tiny",
        f"name={name}",
        f"runs_dir={runs}",
        f"data.shards={data}/shards",
        f"tokenizer.path={data}/tokenizer",
        "model.text.vocab_size=600",
        *overrides,
    ]


@pytest.fixture(scope="session")
def environment():
    """environment(threads): of a training process."""
    return lambda threads=1: {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "WANDB_MODE": "offline",
    }


@pytest.fixture(scope="session")
def train(root, command, environment):
    """train(data, runs, name, *overrides, code) runs the command to its end."""

    def run(data, runs, name, *overrides, code=0):
        done = subprocess.run(
            command(data, runs, name, *overrides),
            cwd=root,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    return run
