import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from curation.select.balance import (
    Balance,
    inclusion_probability,
    keep_probability,
    language_threshold,
    tail_fraction,
)
from curation.step import Scoring, uniform


def part(uids, entries, languages=None):
    kinds = {"uid": pa.array(uids, pa.string()), "entries": pa.array(entries, pa.list_(pa.int32()))}
    if languages is not None:
        kinds["language"] = pa.array(languages, pa.string())
    return pa.table(kinds)


def decide(selector, parts, seed=0):
    """uid -> reason."""
    combined = selector.combine([selector.measure(p) for p in parts])
    reasons = {}
    for p in parts:
        answer = selector.apply(p, combined, seed)
        assert answer.type == pa.string()
        reasons.update(zip(p["uid"].to_pylist(), answer.to_pylist(), strict=True))
    return reasons


@pytest.fixture(scope="module")
def pool():
    """20,000 pairs with up to 6 Zipf-distributed entries, a tenth with none."""
    rng = np.random.default_rng(0)
    entries = [
        sorted(set((rng.zipf(1.3, rng.integers(0, 7)) % 300).tolist()))
        if rng.random() > 0.1
        else []
        for _ in range(20_000)
    ]
    return [f"{i:08x}" for i in range(20_000)], entries


def test_keep_probability_by_hand():
    p = keep_probability(counts=[0, 1, 20, 21, 80], max_pairs_per_entry=20)
    assert p.dtype == np.float64
    assert p.tolist() == [1.0, 1.0, 1.0, 20 / 21, 0.25]
    assert keep_probability(counts=[0, 9], max_pairs_per_entry=math.inf).tolist() == [1.0, 1.0]
    assert keep_probability(counts=np.array([8], np.uint64), max_pairs_per_entry=2) == 0.25


def test_keep_probability_refuses():
    for limit in (0, 0.5, -1, math.nan):
        with pytest.raises(ValueError, match="max_pairs_per_entry"):
            keep_probability(counts=[1], max_pairs_per_entry=limit)
    with pytest.raises(ValueError, match="-3"):
        keep_probability(counts=[1, -3], max_pairs_per_entry=2)


def test_inclusion_probability_by_hand():
    p = np.array([0.5, 0.2, 1.0])
    assert inclusion_probability(entry_ids=[0, 1], probability=p) == pytest.approx(0.6, abs=1e-15)
    assert inclusion_probability(entry_ids=[0, 2], probability=p) == 1.0
    assert inclusion_probability(entry_ids=[], probability=p) == 0.0


def test_language_threshold_by_hand():
    # cumulated shares of [1, 1, 2, 6]: 0.1, 0.2, 0.4, 1
    counts = [6, 1, 2, 1]
    found = [language_threshold(counts=counts, tail_fraction=f) for f in (0.1, 0.28, 0.32, 0.9, 1)]
    assert found == [1, 1, 2, 6, 6]
    assert language_threshold(counts=[0, 0], tail_fraction=0.5) == 1
    assert language_threshold(counts=[], tail_fraction=0.5) == 1
    assert language_threshold(counts=[0, 0, 0, 900], tail_fraction=0.0) == 1  # the reference: 0
    assert language_threshold(counts=[2, 2], tail_fraction=0.75) == 2  # a tie: the first
    with pytest.raises(ValueError, match=r"1\.5"):
        language_threshold(counts=[1], tail_fraction=1.5)


def test_tail_fraction_is_strict():
    assert tail_fraction(counts=[1, 1, 2, 6], max_pairs_per_entry=2) == 0.2
    assert tail_fraction(counts=[0, 0], max_pairs_per_entry=2) == 0.0


def test_keeps_as_many_as_the_law_says(pool):
    uids, entries = pool
    selector = Balance(max_pairs_per_entry=60)
    table = part(uids, entries)
    combined = selector.combine([selector.measure(table)])
    counts = np.bincount([e for row in entries for e in row])
    assert np.array_equal(combined[""].counts, counts)
    p = combined[""].probability
    law = np.array([inclusion_probability(entry_ids=row, probability=p) for row in entries])
    reasons = np.array(selector.apply(table, combined, 3).to_pylist(), object)
    kept = reasons == None  # noqa: E711
    spread = np.sqrt((law * (1 - law)).sum())
    assert spread > 20  # there is something to decide
    assert abs(kept.sum() - law.sum()) < 4 * spread
    assert kept[law == 1].all()  # the tail stays
    assert set(reasons[[not row for row in entries]]) == {"no_entry"}
    assert set(reasons[[bool(row) for row in entries]]) == {None, "head"}


def test_decides_by_one_draw_against_the_inclusion(pool):
    uids, entries = (column[:3000] for column in pool)
    selector = Balance(max_pairs_per_entry=9)
    combined = selector.combine([selector.measure(part(uids, entries))])
    draws = uniform(7, "balance", uids)
    expected = []
    for row, draw in zip(entries, draws, strict=True):
        inclusion = inclusion_probability(entry_ids=row, probability=combined[""].probability)
        expected.append("no_entry" if not row else None if inclusion >= draw else "head")
    assert selector.apply(part(uids, entries), combined, 7).to_pylist() == expected


def test_does_not_depend_on_parts_or_order(pool):
    uids, entries = pool
    selector = Balance(max_pairs_per_entry=60)
    whole = decide(selector, [part(uids, entries)])
    shuffle = np.random.default_rng(1).permutation(len(uids))
    pieces = [
        part([uids[i] for i in rows], [entries[i] for i in rows])
        for rows in np.split(shuffle, [0, 5, 9_000])
    ]
    assert decide(selector, pieces) == whole
    assert decide(selector, [part(uids, entries)], seed=1) != whole


def test_unmatched_pairs_can_stay(pool):
    uids, entries = pool
    selector = Balance(max_pairs_per_entry=math.inf, drop_unmatched=False)
    assert set(decide(selector, [part(uids, entries)]).values()) == {None}


def test_null_entries_count_as_unmatched():
    reasons = decide(Balance(max_pairs_per_entry=1), [part(["a", "b"], [None, [3]])])
    assert reasons == {"a": "no_entry", "b": None}


def test_limit_from_the_tail(pool):
    uids, entries = pool
    selector = Balance(tail_fraction=0.1)
    combined = selector.combine([selector.measure(part(uids, entries))])
    counts, limit = combined[""].counts, combined[""].max_pairs_per_entry
    assert limit == language_threshold(counts=counts[counts > 0], tail_fraction=0.1)
    share = counts[counts <= limit].sum() / counts.sum()
    assert share == pytest.approx(0.1, abs=0.02)


@pytest.fixture(scope="module")
def languages(pool):
    """English is half, German a fifth, Thai 40 pairs, the rest null; entries are shared by all."""
    rng = np.random.default_rng(5)
    found = rng.choice(["en", "de", None], len(pool[0]), p=[0.5, 0.2, 0.3]).astype(object)
    found[rng.choice(len(found), 40, replace=False)] = "th"
    return found.tolist()


def by_hand(entries, languages, t_en=None, share=None):
    """language -> (t, {entry: p}) as MetaCLIP 2 has it, over entries that the language mentions."""
    found = {}
    spoken = [language or "other" for language in languages]
    for language in ["en", *sorted(set(spoken) - {"en"})]:
        own = [row for row, code in zip(entries, spoken, strict=True) if code == language]
        counts = Counter(e for row in own for e in row)
        ascending = sorted(counts.values())
        total = sum(ascending)
        if language == "en" and t_en is not None:
            share = sum(c for c in ascending if c < t_en) / total
        sums = [sum(ascending[: i + 1]) for i in range(len(ascending))]
        t = min(zip(sums, ascending, strict=True), key=lambda x: abs(x[0] / total - share))[1]
        if language == "en" and t_en is not None:
            t = t_en
        found[language] = t, {e: t / max(c, t) for e, c in counts.items()}
    return found


@pytest.mark.parametrize("knobs", [{"max_pairs_per_entry": 30}, {"tail_fraction": 0.2}])
def test_languages_by_hand(pool, languages, knobs):
    uids, entries = pool
    selector = Balance(per_language=True, **knobs)
    assert selector.reads == ("entries", "language")
    table = part(uids, entries, languages)
    combined = selector.combine([selector.measure(table)])
    expected = by_hand(
        entries, languages, knobs.get("max_pairs_per_entry"), knobs.get("tail_fraction")
    )
    assert {k: v.max_pairs_per_entry for k, v in combined.items()} == {
        k: t for k, (t, _) in expected.items()
    }
    assert len({t for t, _ in expected.values()}) == 4  # thresholds do differ
    for language, (_, p) in expected.items():
        known = dict(
            zip(combined[language].ids.tolist(), combined[language].probability, strict=True)
        )
        assert known == p
    law = [
        1 - math.prod(1 - expected[language or "other"][1][e] for e in row)
        for row, language in zip(entries, languages, strict=True)
    ]
    assert selector.inclusion(table, combined) == pytest.approx(law, abs=1e-15)


def test_languages_keep_as_many_as_the_law_says(pool, languages):
    """4 standard deviations of a sum of independent draws, in each language and altogether."""
    uids, entries = pool
    selector = Balance(max_pairs_per_entry=30, per_language=True)
    table = part(uids, entries, languages)
    combined = selector.combine([selector.measure(table)])
    law = selector.inclusion(table, combined)
    kept = np.equal(selector.apply(table, combined, 11).to_pylist(), None)
    for language in ("en", "de", None, "all"):
        mine = np.array([language in ("all", code) for code in languages])
        spread = np.sqrt((law[mine] * (1 - law[mine])).sum())
        assert spread > 10
        assert abs(kept[mine].sum() - law[mine].sum()) < 4 * spread


def test_languages_do_not_depend_on_parts_or_order(pool, languages):
    uids, entries = pool
    selector = Balance(max_pairs_per_entry=30, per_language=True)
    whole = decide(selector, [part(uids, entries, languages)])
    shuffle = np.random.default_rng(1).permutation(len(uids))
    pieces = [
        part([uids[i] for i in rows], [entries[i] for i in rows], [languages[i] for i in rows])
        for rows in np.split(shuffle, [0, 5, 9_000])
    ]
    assert decide(selector, pieces) == whole
    everything_english = part(uids, entries, ["en"] * len(uids))
    assert decide(selector, [everything_english]) == decide(
        Balance(max_pairs_per_entry=30), [part(uids, entries)]
    )


def test_a_small_language_is_not_dropped_by_a_zero_threshold():
    """The reference's trap: Thai has two entries of the list, English 0.1 % in the tail."""
    english = [[0]] * 1998 + [[1]] * 2
    thai = [[2]] * 60 + [[3]] * 50
    # the reference: all entries of the list, 0 is nearer to 0.001 than 50/110 is, so t = 0
    counts = np.array([0, 0, 60, 50])
    ascending = np.sort(counts)
    share = tail_fraction(counts=[1998, 2], max_pairs_per_entry=10)
    assert ascending[np.argmin(np.abs(np.cumsum(ascending) / 110 - share))] == 0
    assert language_threshold(counts=counts, tail_fraction=share) == 1  # clamped

    uids = [f"{i:08x}" for i in range(len(english) + len(thai))]
    table = part(uids, english + thai, ["en"] * len(english) + ["th"] * len(thai))
    selector = Balance(max_pairs_per_entry=10, per_language=True)
    combined = selector.combine([selector.measure(table)])
    assert combined["th"].max_pairs_per_entry == 50
    assert combined["th"].probability.tolist() == [50 / 60, 1.0]
    kept = [u for u, reason in decide(selector, [table]).items() if reason is None]
    assert len([u for u in kept if int(u, 16) >= len(english)]) >= 90


def test_languages_without_the_main_one():
    table = part(["a", "b"], [[1], []], ["de", "en"])
    selector = Balance(max_pairs_per_entry=2, per_language=True)
    with pytest.raises(ValueError, match=r"'en', of which no pair has an entry.*de.*tail_fraction"):
        decide(selector, [table])
    selector = Balance(max_pairs_per_entry=2, per_language=True, main_language="de")
    assert decide(selector, [table]) == {"a": None, "b": "no_entry"}
    nothing = part(["a"], [[]], ["de"])
    assert decide(Balance(max_pairs_per_entry=2, per_language=True), [nothing]) == {"a": "no_entry"}
    assert decide(Balance(tail_fraction=0.1, per_language=True), [part([], [], [])]) == {}


def test_a_plain_balance_leaves_no_scores():
    assert not isinstance(Balance(max_pairs_per_entry=1), Scoring)


def test_empty_parts():
    selector = Balance(max_pairs_per_entry=1)
    assert decide(selector, [part([], [])]) == {}
    assert decide(selector, [part(["a"], [[]]), part([], [])]) == {"a": "no_entry"}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "exactly one"),
        ({"max_pairs_per_entry": 1, "tail_fraction": 0.1}, "exactly one"),
        ({"max_pairs_per_entry": 0}, "max_pairs_per_entry 0"),
        ({"tail_fraction": 2}, "tail_fraction 2"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Balance(**knobs)
