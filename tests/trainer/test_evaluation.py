"""Evaluation while a run goes on changes nothing of the run."""

import pytest
import torch

from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.callbacks.evaluation import Evaluation
from pipeline.trainer.checkpoints import find_newest

NODE = "callbacks.evaluation"


def words(data, every=160):
    return [
        "callbacks=[default,evaluation]",
        f"{NODE}.every_samples={every}",
        f"+eval@{NODE}.tasks=[geometry,retrieval]",
        f"{NODE}.tasks.geometry.data={data}/shards",
        f"{NODE}.tasks.geometry.max_pairs=40",
        f"{NODE}.tasks.retrieval.data={data}/shards",
    ]


def weights(run):
    return torch.load(find_newest(run / "checkpoints"), weights_only=True)["state_dict"]


def losses(run):
    return [row["train/loss"] for row in read_metrics(run) if "train/loss" in row]


def test_the_run_is_the_same_and_its_numbers_are_beside_it(data, tmp_path, train):
    train(data, tmp_path, "plain", "samples_seen=384")
    train(data, tmp_path, "watched", "samples_seen=384", *words(data))
    assert losses(tmp_path / "watched") == losses(tmp_path / "plain")
    one, other = weights(tmp_path / "watched"), weights(tmp_path / "plain")
    assert all(torch.equal(one[key], other[key]) for key in other)
    rows = [row for row in read_metrics(tmp_path / "watched") if "eval/geometry/gap" in row]
    # the steps of 32 pairs that pass 160 and 320, and the last
    assert [row["samples_seen"] for row in rows] == [160, 320, 384]
    assert all("eval/retrieval/image_to_text_r_at_1" in row for row in rows)
    assert rows[0]["eval/geometry/gap"] != rows[-1]["eval/geometry/gap"]


@pytest.mark.slow
def test_two_processes_share_it(data, tmp_path, train):
    knobs = ["samples_seen=192", "trainer.devices=2", "trainer.strategy=ddp"]
    train(data, tmp_path, "alone", "samples_seen=192", *words(data, every=96))
    train(data, tmp_path, "two", *knobs, *words(data, every=96))
    alone, two = (
        [row for row in read_metrics(tmp_path / name) if "eval/geometry/gap" in row]
        for name in ("alone", "two")
    )
    assert [row["samples_seen"] for row in two] == [96, 192]
    for ours, theirs in zip(two, alone, strict=True):
        assert ours["eval/geometry/alignment"] == pytest.approx(
            theirs["eval/geometry/alignment"], abs=1e-4
        )


def test_what_is_missing_is_named(data, tmp_path, train):
    with pytest.raises(ValueError, match=r"0 tasks: .*\+eval@callbacks\.evaluation\.tasks"):
        Evaluation(every_samples=1, tasks={})
    done = train(data, tmp_path, "x", "callbacks=[default,evaluation]", code=2)
    assert "callbacks.evaluation.every_samples" in done.stderr
