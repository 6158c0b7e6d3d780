import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.annotate.external_scores import ExternalScores


@pytest.fixture
def write(tmp_path):
    def write(name="scores.parquet", **columns):
        pq.write_table(pa.table(columns), tmp_path / name)
        return str(tmp_path / name)

    return write


def look_up(annotator, *uids):
    return annotator.annotate([{"uid": uid} for uid in uids])


def test_joins_by_uid(write):
    file = write(
        uid=["c", "a", "b", None, "ä"],
        punsafe=pa.array([0.5, 0.25, None, 0.1, 0.75], pa.float64()),
        aesthetic=pa.array([5, 6, 7, 8, 9], pa.int64()),
        other=["not", "looked", "at", "at", "all"],
    )
    annotator = ExternalScores(file=file, scores=["punsafe", "aesthetic"])
    assert list(annotator.columns) == ["punsafe", "aesthetic", "punsafe_error"]
    missing = {"punsafe": None, "aesthetic": None, "punsafe_error": "missing"}
    assert look_up(annotator, "a", "longer than any", "b", "c", "ä", "", "0") == [
        {"punsafe": 0.25, "aesthetic": 6.0, "punsafe_error": None},
        missing,
        {"punsafe": None, "aesthetic": 7.0, "punsafe_error": "not_finite"},
        {"punsafe": 0.5, "aesthetic": 5.0, "punsafe_error": None},
        {"punsafe": 0.75, "aesthetic": 9.0, "punsafe_error": None},
        missing,
        missing,
    ]


def test_equals_a_dictionary(write):
    rng = np.random.default_rng(0)
    uids = [f"{i:06x}" for i in rng.integers(0, 3000, 2000)]
    scores = {uid: float(np.float32(rng.random())) for uid in uids}
    file = write(uid=uids, aesthetic=[scores[uid] for uid in uids])  # repeats, which agree
    asked = [f"{i:06x}" for i in rng.integers(0, 3000, 5000)]
    found = look_up(ExternalScores(file=file, scores=["aesthetic"]), *asked)
    assert [row["aesthetic"] for row in found] == [scores.get(uid) for uid in asked]
    assert {row["aesthetic_error"] for row in found} == {None, "missing"}


def test_not_a_number_becomes_null(write):
    file = write(uid=["a", "b", "c"], score=[float("nan"), float("-inf"), 1e300])
    found = look_up(ExternalScores(file=file, scores=["score"]), "a", "b", "c")
    assert found == [{"score": None, "score_error": "not_finite"}] * 3


def test_other_keys(write):
    file = write(url=["http://a", "http://b"], score=[0.5, 0.25])
    annotator = ExternalScores(file=file, scores=["score"], key="url")
    assert annotator.reads == ("url",)
    batch = [{"uid": "x", "url": "http://b"}, {"uid": "y", "url": None}]
    assert [row["score"] for row in annotator.annotate(batch)] == [0.25, None]


def test_conflicting_rows_are_refused_by_key(write):
    file = write(uid=["a", "b", "a"], score=[0.5, 0.25, 0.75])
    with pytest.raises(ValueError, match=r"different scores for one uid, such as \['a'\]"):
        look_up(ExternalScores(file=file, scores=["score"]), "b")
    same = write("same.parquet", uid=["a", "a"], score=[float("nan")] * 2)
    assert look_up(ExternalScores(file=same, scores=["score"]), "a")[0]["score"] is None


def test_the_file_of_another_pool_stops_the_run(write):
    file = write(uid=["a"], score=[0.5])
    annotator = ExternalScores(file=file, scores=["score"], max_missing_fraction=0.9)
    with pytest.raises(ValueError, match="99 of 100 pairs have no uid"):
        look_up(annotator, "a", *map(str, range(99)))
    assert len(look_up(annotator, *map(str, range(99)))) == 99  # few pairs are bad luck


def test_empty_file_and_batch(write):
    file = write(uid=pa.array([], pa.string()), score=pa.array([], pa.float32()))
    annotator = ExternalScores(file=file, scores=["score"])
    assert look_up(annotator, "a")[0]["score_error"] == "missing"
    assert look_up(annotator) == []


def test_the_table_is_not_pickled(write):
    file = write(uid=[f"{i:032x}" for i in range(1000)], score=[0.5] * 1000)
    annotator = ExternalScores(file=file, scores=["score"])
    look_up(annotator, "0")
    assert len(pickle.dumps(annotator)) < 2000
    assert annotator.inputs == {"file": file}


def test_bad_knobs(write, tmp_path):
    file = write(uid=["a"], score=["text"], number=[1.0])
    with pytest.raises(ValueError, match=r"no column punsafe \(it has: uid, score, number\)"):
        look_up(ExternalScores(file=file, scores=["punsafe"]), "a")
    with pytest.raises(ValueError, match="holds string, not numbers"):
        look_up(ExternalScores(file=file, scores=["score"]), "a")
    with pytest.raises(ValueError, match="nothing.parquet does not exist"):
        ExternalScores(file=str(tmp_path / "nothing.parquet"), scores=["score"])
    for scores in ("score", [], ["a", "a"]):
        with pytest.raises(ValueError, match="need a list"):
            ExternalScores(file=file, scores=scores)
    with pytest.raises(ValueError, match="unknown key 'hash'"):
        ExternalScores(file=file, scores=["number"], key="hash")
    with pytest.raises(ValueError, match="max_missing_fraction 2"):
        ExternalScores(file=file, scores=["number"], max_missing_fraction=2)
