import logging

import numpy as np
import pyarrow as pa
import pytest

from curation.select.text_clusters import TextClusters
from curation.step import Scoring

CENTRES = np.eye(4, 8, dtype=np.float32)  # four directions far apart
SHARE = (0.0, 0.25, 0.75, 1.0)  # of a cluster's images that hold text
COUNT = 40  # pairs a cluster


def pool(seed=0):
    """A table in random order and the planted cluster of each row."""
    rng = np.random.default_rng(seed)
    planted = np.repeat(np.arange(4), COUNT)
    vectors = CENTRES[planted] + rng.normal(0, 0.05, (len(planted), 8))
    area = np.concatenate([[0.1] * int(s * COUNT) + [0.0] * round((1 - s) * COUNT) for s in SHARE])
    order = rng.permutation(len(planted))
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in rng.permutation(len(planted))],
            "image_embed": pa.array(
                vectors[order].astype(np.float32).tolist(), pa.list_(pa.float32())
            ),
            "text_area_fraction": pa.array(area[order], pa.float32()),
        }
    )
    return table, planted[order]


def run(selector, table, cuts=()):
    """(reasons, scores) by uid, the table cut into parts."""
    parts = [
        table.slice(start, stop - start)
        for start, stop in zip([0, *cuts], [*cuts, table.num_rows], strict=True)
    ]
    combined = selector.combine([selector.measure(part) for part in parts])
    answers = {}
    for part in parts:
        reasons = selector.apply(part, combined, 0).to_pylist()
        scores = selector.score(part, combined, 0)
        assert {name: array.type for name, array in scores.items()} == dict(selector.columns)
        columns = [scores[name].to_pylist() for name in selector.columns]
        rows = zip(reasons, *columns, strict=True)
        answers |= dict(zip(part["uid"].to_pylist(), rows, strict=True))
    return answers


def test_planted_clusters_have_their_text_rates():
    table, planted = pool()
    selector = TextClusters(num_clusters=4)
    assert isinstance(selector, Scoring)
    answers = run(selector, table)
    numbers = {}
    for uid, cluster in zip(table["uid"].to_pylist(), planted, strict=True):
        reason, number, rate = answers[uid]
        assert reason is None  # scores only
        assert rate == SHARE[cluster]
        numbers.setdefault(cluster, set()).add(number)
    assert sorted(n for found in numbers.values() for n in found) == [0, 1, 2, 3]


def test_clusters_above_the_rate_go_whole():
    table, planted = pool()
    answers = run(TextClusters(num_clusters=4, max_text_rate=0.75), table)
    dropped = [answers[uid][0] == "text_cluster" for uid in table["uid"].to_pylist()]
    assert dropped == (planted == 3).tolist()  # 0.75 is not above 0.75
    answers = run(TextClusters(num_clusters=4, max_text_rate=0.0), table)
    dropped = [answers[uid][0] is not None for uid in table["uid"].to_pylist()]
    assert dropped == (planted > 0).tolist()
    assert sum(dropped) == 3 * COUNT  # images without text among them


def test_rates_against_a_count_over_the_given_clusters():
    rng = np.random.default_rng(3)
    count = 200
    area = rng.choice([0.0, 0.02, 0.3, np.nan], count)
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in range(count)],
            "image_embed": pa.array(rng.normal(size=(count, 5)).tolist(), pa.list_(pa.float32())),
            "text_area_fraction": pa.array(area, pa.float32(), mask=np.isnan(area)),
        }
    )
    answers = run(TextClusters(num_clusters=7, min_text_area_fraction=0.1), table)
    numbers = np.array([answers[uid][1] for uid in table["uid"].to_pylist()])
    assert set(numbers) == set(range(7))
    for index, uid in enumerate(table["uid"].to_pylist()):
        mates = area[numbers == numbers[index]]
        expected = np.mean(mates[~np.isnan(mates)] > 0.1)
        assert answers[uid][2] == pytest.approx(expected)


@pytest.mark.parametrize("fit_fraction", [1.0, 0.5])
def test_parts_and_order_do_not_matter(fit_fraction):
    table, _ = pool(seed=1)
    selector = TextClusters(num_clusters=6, max_text_rate=0.5, fit_fraction=fit_fraction)
    whole = run(selector, table)
    assert {reason for reason, _, _ in whole.values()} == {None, "text_cluster"}
    assert run(selector, table, cuts=[1, 7, 7, 100]) == whole
    assert run(selector, table.take(np.random.default_rng(2).permutation(table.num_rows))) == whole


def test_another_seed_draws_other_clusters():
    table, _ = pool(seed=1)
    first, second = (run(TextClusters(num_clusters=9, cluster_seed=s), table) for s in (0, 1))
    assert first != second


def test_pairs_without_an_embedding_or_a_reading(caplog):
    table, _ = pool()
    rows = table.to_pylist()
    rows[0]["image_embed"] = None
    rows[1]["image_embed"] = [float("nan")] * 8
    for row in rows[2:]:
        row["text_area_fraction"] = 0.5
    everywhere = pa.Table.from_pylist(rows, schema=table.schema)
    selector = TextClusters(num_clusters=4, max_text_rate=0.0)
    answers = run(selector, everywhere)
    assert [answers[row["uid"]] for row in rows[:2]] == [(None, None, None)] * 2
    assert {answers[row["uid"]][0] for row in rows[2:]} == {"text_cluster"}
    for row in rows[2:]:
        row["text_area_fraction"] = None
    unread = pa.Table.from_pylist(rows, schema=table.schema)
    with caplog.at_level(logging.WARNING):
        answers = run(selector, unread)
    assert "no image with an embedding was read" in caplog.text
    for row in rows[:2]:
        assert answers[row["uid"]] == (None, None, None)
    assert all(
        reason is None and number is not None and rate is None
        for reason, number, rate in (answers[row["uid"]] for row in rows[2:])
    )
    assert set(run(selector, unread.slice(0, 2)).values()) == {(None, None, None)}
    assert run(selector, unread.slice(0, 0)) == {}


def test_fewer_pairs_than_clusters():
    table, _ = pool()
    answers = run(TextClusters(num_clusters=100), table.slice(0, 3))
    assert sorted(number for _, number, _ in answers.values()) == [0, 1, 2]
    assert {rate for _, _, rate in answers.values()} <= {0.0, 1.0}


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_text_rate": 1.5},
        {"num_clusters": 0},
        {"iterations": 0},
        {"min_text_area_fraction": 1.0},
        {"fit_fraction": 0.0},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        TextClusters(**knobs)
