"""Sets in Hugging Face's Parquet layout, parts of sets, other prompts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.evals.labelled_parquet import LabelledParquet, labelled
from pipeline.evals.zero_shot import ZeroShot
from tests.evals.test_zero_shot import Known, write_set

FEATURES = {
    "img": {"_type": "Image"},
    "fine": {"_type": "ClassLabel", "names": ["cat", "dog", "an_emu"]},
    "coarse": {"_type": "ClassLabel", "names": ["x"]},
}


def parquet(folder, labels=(0, 1, 2, 1), features=FEATURES, **columns):
    rows = [
        {"img": {"bytes": f"{n} {label}".encode(), "path": None}, "fine": label, "coarse": 0}
        for n, label in enumerate(labels)
    ]
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    folder.mkdir(parents=True, exist_ok=True)
    half = len(labels) // 2
    for number, part in enumerate((table[:half], table[half:])):
        path = folder / f"test-{number:05d}-of-00002.parquet"
        pq.write_table(part.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("inside", ["", "data"])
def test_a_hugging_face_set(inside, tmp_path):
    parquet(tmp_path / inside)
    found = labelled(tmp_path, "test")
    assert isinstance(found, LabelledParquet)
    assert found.class_names() == ["cat", "dog", "an emu"]
    assert found.templates() == ["a photo of a {c}."]
    assert list(found.samples()) == [(b"0 0", 0), (b"1 1", 1), (b"2 2", 2), (b"3 1", 1)]
    # CLIP_benchmark's files beside it win
    (tmp_path / "classnames.txt").write_text("cat\ndog\nemu\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\n")
    assert ZeroShot(data=str(tmp_path)).run(Known(sees={0: 1}))["top1"] == 0.75


def test_columns_without_types_go_by_their_names(tmp_path):
    table = pa.table({"image": [b"0 1"], "label": [1]})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"no names; write classnames\.txt"):
        labelled(tmp_path, "test").class_names()
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert list(labelled(tmp_path, "test").samples()) == [(b"0 1", 1)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"fine": [0, 1, 3, 1]}, "label 3, and 3 classes"),
        ({"fine": [0, -1, 2, 1]}, "label -1"),
        ({"fine": [0, None, 2, 1]}, "without an image or a label"),
        ({"img": [b"", None, b"", b""]}, "without an image or a label"),
    ],
)
def test_rows_that_do_not_fit(columns, words, tmp_path):
    parquet(tmp_path, **columns)
    with pytest.raises(ValueError, match=words):
        list(labelled(tmp_path, "test").samples())


def test_files_that_do_not_fit(tmp_path):
    parquet(tmp_path, features={"img": {"_type": "Image"}})
    with pytest.raises(ValueError, match="no column of type ClassLabel"):
        list(labelled(tmp_path, "test").samples())
    (tmp_path / "test-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    parquet(tmp_path / "b")
    (tmp_path / "b" / "test-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="damaged"):
        list(labelled(tmp_path / "b", "test").samples())
    with pytest.raises(ValueError, match="nshards.txt"):
        ZeroShot(data=str(tmp_path), split="validation").run(Known())


def test_some_of_the_classes(tmp_path):
    data = write_set(tmp_path / "set")
    # image 2, an emu, is taken for a cat: it takes no part
    trained = Known(sees={2: 0, 3: 0})
    found = ZeroShot(data=str(data), classes=["dog", "cat"]).run(trained)
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["mean_per_class_recall"] == pytest.approx((1 + 1 / 2) / 2)
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert ZeroShot(data=str(data), classes=str(tmp_path / "names.txt")).run(trained) == found
    assert ZeroShot(data=str(data)).run(trained)["top1"] == pytest.approx(1 / 2)


def test_other_prompts(tmp_path):
    data = write_set(tmp_path / "set")
    (tmp_path / "prompts.txt").write_text("a picture of a {c}\n\n{c}\n")
    task = ZeroShot(data=str(data), templates=str(tmp_path / "prompts.txt"))
    assert task.images.templates() == ["a picture of a {c}", "{c}"]
    assert task.run(Known())["top1"] == 1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"classes": ["dog", "unicorn"]}, "'unicorn'"),
        ({"classes": ["dog", "dog"]}, "'dog', 'dog'"),
        ({"classes": []}, "of 0"),
        ({"classes": "no.txt"}, r"no\.txt is missing"),
        ({"templates": "no.txt"}, r"no\.txt is missing"),
    ],
)
def test_parts_that_are_not_there(knobs, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ZeroShot(data=str(write_set(tmp_path)), **knobs).run(Known())
