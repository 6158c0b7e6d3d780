"""The contract between curation and training."""

import hashlib
import json
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.shards import (
    Dataset,
    Record,
    content_uid,
    read_manifest,
    records,
    write_manifest,
    write_shard,
)


@pytest.fixture
def dataset(tmp_path, make_picture):
    made = []
    for number in range(7):
        image, caption = make_picture(number), f"caption {number} é 日本"
        uid = content_uid(image, caption)
        info = {"uid": uid, "width": 24, "height": 24, "stats": {"clip_score": 0.5, "a": 1.0}}
        made.append(Record(uid, image, "png", caption, info))
    shards = [
        write_shard(tmp_path, "shard-000000", made[:4]),
        write_shard(tmp_path, "shard-000001", made[4:]),
    ]
    step = {"name": "ingest", "read": 8, "kept": 7, "dropped": {"empty_image": 1}}
    manifest = {"num_samples": 7, "shards": shards, "steps": [step]}
    write_manifest(tmp_path, manifest)
    return tmp_path, made


def test_records_come_back_whole_and_in_order(dataset):
    folder, made = dataset
    assert list(records(folder)) == made


def test_other_readers_see_the_same(dataset):
    folder, made = dataset
    urls = [str(folder / f"shard-00000{n}.tar") for n in range(2)]
    seen = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in seen] == [r.uid for r in made]
    assert [s["png"] for s in seen] == [r.image for r in made]
    assert [s["txt"].decode() for s in seen] == [r.caption for r in made]
    with tarfile.open(folder / "shard-000000.tar") as archive:
        assert {m.mtime for m in archive} == {0}


def test_the_manifest_tells_the_truth(dataset):
    folder, _ = dataset
    for shard in read_manifest(folder)["shards"]:
        data = (folder / f"{shard['name']}.tar").read_bytes()
        assert shard["num_bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()


def test_the_index_points_at_every_member(dataset):
    folder, made = dataset
    shard, row = Dataset(folder).locate(5)
    entry = shard.index.slice(row, 1).to_pylist()[0]
    data = (folder / "shard-000001.tar").read_bytes()
    for member, wanted in (("image", made[5].image), ("txt", made[5].caption.encode())):
        start = entry["offset"][member]
        assert data[start : start + entry["size"][member]] == wanted


def test_writing_twice_gives_the_same_bytes(dataset, tmp_path):
    folder, made = dataset
    write_shard(tmp_path / "again", "shard-000000", made[:4])
    for name in ("shard-000000.tar", "shard-000000.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_without_a_manifest_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json.*python -m curation\.run"):
        read_manifest(tmp_path)


def test_another_format_is_refused(dataset):
    folder, _ = dataset
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": "other-9"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="other-9"):
        read_manifest(folder)


@pytest.mark.parametrize("damage", ["tar", "parquet", "short"])
def test_a_damaged_copy_is_named(dataset, damage):
    folder, _ = dataset
    tar = folder / "shard-000001.tar"
    if damage == "short":
        tar.write_bytes(tar.read_bytes()[:1000])
    else:
        tar.with_suffix(f".{damage}").unlink()
    with pytest.raises(ValueError, match=r"shard-000001.*copy it again"):
        list(records(folder))


@pytest.mark.parametrize("column", ["uid", "extension", "caption"])
def test_an_index_without_a_column_is_named(dataset, column):
    folder, _ = dataset
    path = folder / "shard-000001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(column), path)
    with pytest.raises(ValueError, match=rf"shard-000001\.parquet: damaged .*{column}.*copy it"):
        list(records(folder))


def test_lost_pairs_cannot_be_written_down(tmp_path):
    step = {"name": "ingest", "read": 8, "kept": 7, "dropped": {}}
    with pytest.raises(AssertionError, match="ingest"):
        write_manifest(tmp_path, {"shards": [], "steps": [step]})
