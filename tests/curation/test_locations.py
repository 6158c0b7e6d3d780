"""A pool that fsspec reads gives the same bytes as the same pool on a disk."""

import os

import pytest

from curation.run import run
from pipeline.check import composed


def curate(pool, out, *overrides):
    words = ["engine.workers=1", f"pool={pool}", f"out={out}", "pack.records_per_shard=5"]
    hashes = "+annotate@annotate.hashes=hashes"
    return run(composed("curate", [*words, hashes, *overrides]))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def tars(parquet_pool, tmp_path):
    """Our own shards as a pool: tars without their index."""
    curate(parquet_pool(12), tmp_path / "shards")
    pool = tmp_path / "tars"
    (pool / "deeper").mkdir(parents=True)
    for number, tar in enumerate(sorted((tmp_path / "shards").glob("*.tar"))):
        tar.rename(pool / ("deeper" if number else ".") / tar.name)
    return pool


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_the_same_bytes_from_anywhere(kind, parquet_pool, request, tmp_path):
    pool = parquet_pool(23) if kind == "parquet" else request.getfixturevalue("tars")
    curate(pool, tmp_path / "near")
    far = f"file://{pool}"
    curate(far, tmp_path / "far", f"cache={tmp_path}/far-cache")
    assert len(contents(tmp_path / "near")) > 6
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


def test_a_far_pool_needs_a_cache_and_is_watched(tars, tmp_path):
    far = f"file://{tars}"
    with pytest.raises(ValueError, match="cache=DIR"):
        curate(far, tmp_path / "out")
    curate(far, tmp_path / "out", f"cache={tmp_path}/cache")
    os.utime(tars / "shard-000000.tar", (1, 1))
    with pytest.raises(ValueError, match=r"shard-000000.tar changed since it was ingested"):
        curate(far, tmp_path / "out", f"cache={tmp_path}/cache")
