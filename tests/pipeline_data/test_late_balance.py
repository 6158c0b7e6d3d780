"""The epochs of a late balance are long enough to train on."""

import pytest

from pipeline.shards import Record, write_manifest, write_shard


@pytest.fixture
def balanced(tmp_path, make_picture):
    def write(probability, count=40):
        folder = tmp_path / f"{probability}"
        made = [
            Record(
                f"{n:032x}",
                make_picture(n),
                "png",
                f"caption {n}",
                {"stats": {"inclusion_probability": probability}},
            )
            for n in range(count)
        ]
        entry = write_shard(folder, "shard-000000", made)
        write_manifest(folder, {"num_samples": count, "shards": [entry], "steps": []})
        return folder

    return write


def test_an_epoch_that_is_smaller_than_a_batch_is_refused(balanced, make_stream, take):
    words = r"holds 20 pairs an epoch, fewer than one batch of 24"
    with pytest.raises(ValueError, match=words):
        make_stream(balanced(0.5), batch=24, late_balance=True)
    take(make_stream(balanced(0.5), batch=12, late_balance=True), 4)
    take(make_stream(balanced(0.5), batch=24), 2)


def test_probabilities_of_nothing_are_refused(balanced, make_stream, tmp_path):
    for knobs in ({}, {"cache": str(tmp_path / "cache")}):
        with pytest.raises(ValueError, match="inclusion_probability is 0 for all pairs"):
            make_stream(balanced(0.0), late_balance=True, **knobs)


@pytest.mark.parametrize("share", [7, -1, float("nan")])
def test_a_share_of_bad_pairs_is_a_share(balanced, make_stream, share):
    with pytest.raises(ValueError, match="max_bad_fraction"):
        make_stream(balanced(1.0), max_bad_fraction=share)
