import numpy as np
import pyarrow as pa
import pytest

from curation.select.balance import Balance
from curation.select.late_balance import LateBalance
from curation.step import Scoring, uniform


@pytest.fixture(scope="module")
def table():
    """5,000 pairs of three languages with Zipf-distributed entries, some without."""
    rng = np.random.default_rng(0)
    entries = [sorted(set((rng.zipf(1.3, rng.integers(0, 5)) % 90).tolist())) for _ in range(5000)]
    columns = {
        "uid": pa.array([f"{i:08x}" for i in range(5000)]),
        "entries": pa.array([row or None for row in entries], pa.list_(pa.int32())),
        "language": pa.array(rng.choice(["en", "de", "th"], 5000, p=[0.7, 0.2, 0.1])),
    }
    return pa.table(columns)


def combined(selector, table):
    return selector.combine(
        [selector.measure(table.slice(0, 700)), selector.measure(table.slice(700))]
    )


def test_scores_as_the_protocol_says(table):
    selector = LateBalance(max_pairs_per_entry=20)
    assert isinstance(selector, Scoring)
    scores = selector.score(table, combined(selector, table), 0)
    assert {name: column.type for name, column in scores.items()} == selector.columns
    assert len(scores["inclusion_probability"]) == len(table)


@pytest.mark.parametrize("per_language", [False, True])
def test_one_draw_of_the_late_balance_is_the_early_one(table, per_language):
    """The same law, so the same uniforms keep the same pairs."""
    knobs = {"max_pairs_per_entry": 20, "per_language": per_language}
    late, early = LateBalance(**knobs), Balance(**knobs)
    assert late.reads == early.reads
    facts = combined(late, table)
    inclusion = late.score(table, facts, 3)["inclusion_probability"].to_numpy()
    assert late.apply(table, facts, 3).to_pylist() == [
        None if row else "no_entry" for row in table["entries"].to_pylist()
    ]
    draws = uniform(3, "balance", table["uid"].to_pylist())
    kept = (inclusion >= draws) & table["entries"].is_valid().to_numpy()
    reasons = early.apply(table, combined(early, table), 3).to_pylist()
    assert np.array_equal(kept, np.equal(reasons, None))
    assert 500 < kept.sum() < 4000


def test_a_new_draw_each_epoch_follows_the_law(table):
    """The kept share of each of 60 epochs is within 4 sd, and a pair's own share as well."""
    selector = LateBalance(max_pairs_per_entry=20, per_language=True)
    facts = combined(selector, table)
    p = selector.score(table, facts, 0)["inclusion_probability"].to_numpy()
    uids = table["uid"].to_pylist()
    epochs = [p >= uniform(1, "balance", uids, salt=[e] * len(uids)) for e in range(60)]
    epochs = np.array(epochs) & (p > 0)
    spread = np.sqrt((p * (1 - p)).sum())
    assert spread > 20
    assert (np.abs(epochs.sum(axis=1) - p.sum()) < 4 * spread).all()
    assert (epochs[0] != epochs[1]).any()
    assert epochs[:, p == 1].all()
    some = (p > 0.2) & (p < 0.8)
    apart = (epochs[:, some].mean(axis=0) - p[some]) / np.sqrt(p[some] * (1 - p[some]) / 60)
    assert abs(apart.mean()) < 4 / np.sqrt(some.sum())
    assert 0.9 < apart.std() < 1.1


def test_unmatched_pairs_can_stay_for_certain(table):
    selector = LateBalance(max_pairs_per_entry=20, drop_unmatched=False)
    facts = combined(selector, table)
    inclusion = selector.score(table, facts, 0)["inclusion_probability"].to_numpy()
    assert selector.apply(table, facts, 0).null_count == len(table)
    assert (inclusion[table["entries"].is_null().to_numpy()] == 1.0).all()


def test_empty_part(table):
    selector = LateBalance(tail_fraction=0.1, per_language=True)
    empty = table.slice(0, 0)
    facts = selector.combine([selector.measure(empty)])
    assert len(selector.apply(empty, facts, 0)) == 0
    assert len(selector.score(empty, facts, 0)["inclusion_probability"]) == 0


def test_knobs_are_those_of_the_balance():
    with pytest.raises(ValueError, match="exactly one"):
        LateBalance()
