"""Fixtures of the whole suite."""

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

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
