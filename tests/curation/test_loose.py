"""Pictures that lie about as files: beside captions, or under a table."""

import json
import subprocess
import sys

import pytest

from curation.ingest import Ingest, identity, pool_files, read_images
from pipeline.shards import read_manifest, records


@pytest.fixture
def folder(tmp_path, make_picture):
    """12 pairs in two folders, a picture without a caption, one that is none, a stray file."""
    root = tmp_path / "pool"
    for number in range(12):
        place = root / ("cats" if number % 2 else "dogs/small")
        place.mkdir(parents=True, exist_ok=True)
        kind, ending = ("PNG", "png") if number % 3 else ("JPEG", "JPG")
        (place / f"{number}.{ending}").write_bytes(make_picture(number, kind))
        (place / f"{number}.txt").write_text(f"thing number {number}\n")
    (root / "cats" / "silent.png").write_bytes(make_picture(90))
    (root / "cats" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (root / "cats" / "broken.txt").write_text("a broken one")
    (root / "cats" / "notes.md").write_text("not part of it")
    return root


@pytest.fixture
def curate(root):
    """curate(pool, out, *overrides, code) runs the command."""

    def run(pool, out, *overrides, code=0):
        words = [sys.executable, "-m", "curation.run", "dataset=raw", f"pool={pool}", f"out={out}"]
        done = subprocess.run(
            [*words, *overrides], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def test_a_folder_becomes_shards(folder, tmp_path, curate, make_picture):
    curate(folder, tmp_path / "out", "pack.records_per_shard=5", "ingest.max_bad_fraction=0.9")
    step = read_manifest(tmp_path / "out")["steps"][0]
    assert (step["read"], step["kept"]) == (14, 12)
    assert step["dropped"] == {"missing_caption": 1, "not_an_image": 1}
    found = {record.caption.strip(): record.image for record in records(tmp_path / "out")}
    wanted = {f"thing number {n}": make_picture(n, "PNG" if n % 3 else "JPEG") for n in range(12)}
    assert found == wanted


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_table_gives_captions(kind, tmp_path, make_picture, curate):
    root = tmp_path / "pool"
    (root / "images").mkdir(parents=True)
    secret = tmp_path / "outside.png"
    secret.write_bytes(make_picture(50))
    rows = []
    for number in range(6):
        (root / "images" / f"{number}.png").write_bytes(make_picture(number))
        rows.append({"file_name": f"images/{number}.png", "text": f"say, {number}"})
    rows += [
        {"file_name": "../outside.png", "text": "elsewhere"},
        {"file_name": str(secret), "text": "elsewhere too"},
        {"file_name": "images/none.png", "text": "gone"},
        {"file_name": "images/1.png", "text": ""},
    ]
    mark = "\t" if kind == "tsv" else ","
    if kind == "jsonl":
        lines = [*map(json.dumps, rows), "{torn"]
    else:
        lines = [mark.join(("file_name", "text"))]
        lines += [f'{row["file_name"]}{mark}"{row["text"]}"' for row in rows]
    (root / f"metadata.{kind}").write_text("\n".join(lines))
    curate(root, tmp_path / "out", "ingest.max_bad_fraction=0.9")
    step = read_manifest(tmp_path / "out")["steps"][0]
    assert step["kept"] == 6
    reasons = {"path_outside_the_pool": 2, "missing_image": 1, "missing_caption": 1}
    assert step["dropped"] == reasons | ({"unreadable_row": 1} if kind == "jsonl" else {})


def test_what_changes_a_pool_changes_its_identity(folder):
    files = pool_files(folder)
    assert [file.name for file in files] == ["cats", "small"]
    before = [identity(file) for file in files]
    (folder / "cats" / "1.txt").write_text("another caption")
    after = [identity(file) for file in files]
    assert before[0] != after[0] and before[1] == after[1]


def test_a_picture_that_is_gone_is_named(folder):
    rows, _, _ = Ingest().run(pool_files(folder)[0])
    (folder / "cats" / "11.png").unlink()
    with pytest.raises((ValueError, IndexError), match=r"gone|range"):
        list(read_images(pool_files(folder)[0], rows["row"].to_pylist() + [99], []))


def test_archives_come_first(parquet_pool, make_picture):
    pool = parquet_pool(4, files=1)
    (pool / "loose.png").write_bytes(make_picture(1))
    assert [file.suffix for file in pool_files(pool)] == [".parquet"]


def test_a_table_without_its_column_is_refused(tmp_path, curate):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "metadata.csv").write_text("path,caption\na.png,b\n")
    done = curate(tmp_path / "pool", tmp_path / "out", code=2)
    assert "no column file_name (it has: path, caption)" in done.stderr
    (tmp_path / "empty").mkdir()
    done = curate(tmp_path / "empty", tmp_path / "out2", code=2)
    assert "pictures beside captions of the same name" in done.stderr.replace("\n", " ")
