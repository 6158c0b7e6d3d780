"""A pool that fsspec reads gives the same bytes as the same pool on a disk."""

import os

import pytest
from omegaconf import OmegaConf

from curation import pack
from curation.pool import Pool
from curation.run import run
from pipeline.check import composed
from pipeline.config import build
from pipeline.shards import read_rows, records


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


def test_more_pool_files_than_may_be_open(tars, tmp_path, monkeypatch):
    selection = curate(tars, tmp_path / "out", f"cache={tmp_path}/cache")
    node = composed("curate", [f"pool={tars}", f"out={tmp_path}/out"]).ingest
    pool = Pool(tars, tmp_path / "cache", build(node), OmegaConf.to_container(node, resolve=True))
    assert len(pool.files) == 3
    plan = selection.plan()
    pack.place_images(pool, plan, tmp_path / "mark", exchange=False)
    places = read_rows(tmp_path / "mark" / pack.PLACES, 0, plan.num_rows)
    monkeypatch.setattr(pack, "MOST_OPEN", 1)
    found = list(pack.shard_records(pool, plan, places, ("alt",), tmp_path))
    assert [r.image for r in found] == [r.image for r in records(tmp_path / "out")]
    assert len(found) == 12
