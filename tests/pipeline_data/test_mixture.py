"""Streams of several datasets: one state, the same batches for any world, exact shares."""

import re
from collections import Counter

import pytest
import torch


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, write_dataset):
    folder = tmp_path_factory.mktemp("mixture")
    write_dataset(folder / "a", [30, 20, 25])
    write_dataset(folder / "b", [10, 11], first=1000)
    return [
        {"shards": str(folder / "a"), "weight": 3},
        {"shards": str(folder / "b"), "weight": 1},
    ]


def test_shares_are_exact_and_each_dataset_has_epochs_of_its_own(mixture, make_stream, take):
    stream = make_stream(None, batch=32, mixture=mixture)
    assert len(stream) == 96
    numbers = torch.cat([b["tokens"] for b in take(stream, 16)]).flatten().tolist()
    for block in (numbers[:256], numbers[256:]):
        assert sum(n >= 1000 for n in block) == 64
    a, b = [n for n in numbers if n < 1000], [n for n in numbers if n >= 1000]
    for seen, size in ((a, 75), (b, 21)):
        epochs = [seen[i : i + size] for i in range(0, len(seen) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs) > 1


def test_a_mixture_resumes_and_any_world_sees_the_same(mixture, make_stream, take):
    whole = take(make_stream(None, batch=12, mixture=mixture), 30)
    first = make_stream(None, batch=12, mixture=mixture, workers=1)
    iterator = iter(first)
    for _ in range(23):
        next(iterator)
    state = first.state_dict()
    assert state == {"epoch": 0, "index": 23 * 12, "seed": 3}
    again = make_stream(None, batch=12, mixture=mixture)
    again.load_state_dict(state)
    for batch, wanted in zip(take(again, 7), whole[23:], strict=True):
        assert batch["uids"] == wanted["uids"] and batch["first"] == wanted["first"]
        assert torch.equal(batch["images"], wanted["images"])
    for world in (2, 3):
        ranks = [
            take(make_stream(None, batch=12, mixture=mixture, rank=r, world_size=world), 12)
            for r in range(world)
        ]
        for step, wanted in enumerate(whole[:12]):
            assert [uid for rank in ranks for uid in rank[step]["uids"]] == wanted["uids"]


def test_the_same_dataset_twice_is_not_read_in_step(mixture, make_stream, take):
    twice = [dict(mixture[0], weight=1)] * 2
    numbers = torch.cat([b["tokens"] for b in take(make_stream(None, mixture=twice), 16)])
    places = Counter(numbers.flatten().tolist())
    assert max(places.values()) > 1  # two orders of 75 pairs, 64 of each
    stream = make_stream(None, mixture=twice)
    assert [stream.parts[k].order(0, 0) for k in (0, 1)] != [stream.parts[0].order(0, 0)] * 2


@pytest.mark.parametrize(
    ("shards", "given", "words"),
    [
        ("x", [{"shards": "y", "weight": 1}], "not both"),
        (None, None, "data.shards .* or data.mixture"),
        (None, [{"shards": "y"}], r"mixture\[0\].*weight"),
        (None, [{"shards": "y", "weight": 0}], r"mixture\[0\].*above 0"),
        (None, [{"shards": "y", "weight": 1, "wieght": 2}], "wieght"),
    ],
)
def test_what_is_no_mixture_is_named(make_stream, shards, given, words):
    with pytest.raises(ValueError, match=words):
        make_stream(shards, mixture=given)


@pytest.mark.parametrize(
    "entry",
    [
        "y",
        {"shards": "y", "weight": "x"},
        {"shards": "y", "weight": None},
        {"shards": "y", "weight": True},
        {"shards": "y", "weight": float("inf")},
        {"shards": "y", "weight": float("nan")},
        {"shards": None, "weight": 1},
        {"shards": "", "weight": 1},
    ],
)
def test_entries_of_no_sense_are_named(mixture, make_stream, entry):
    with pytest.raises(ValueError, match=r"data\.mixture\[1\] .*needs shards, and a weight above"):
        make_stream(None, mixture=[mixture[0], entry])


def test_a_dataset_smaller_than_its_share_of_a_batch_is_named(mixture, make_stream, take):
    small = [dict(mixture[0], weight=1), dict(mixture[1], weight=1)]  # 75 and 21 pairs
    take(make_stream(None, batch=42, mixture=small), 1)
    with pytest.raises(ValueError, match=r"mixture\[1\] .*/b holds 21 pairs.* the 22 ") as error:
        make_stream(None, batch=44, mixture=small)
    small[1]["weight"] = float(re.search(r"its weight to (\S+) or less", str(error.value))[1])
    assert 0.89 < small[1]["weight"] < 21 / 23
    take(make_stream(None, batch=44, mixture=small), 1)


def test_an_empty_dataset_is_named(tmp_path, mixture, make_stream, write_dataset):
    for counts in ([], [0]):
        empty = write_dataset(tmp_path / f"{len(counts)}", counts)
        for knobs in ({}, {"late_balance": True}):
            with pytest.raises(ValueError, match="holds no pairs"):
                make_stream(empty, **knobs)
        with pytest.raises(ValueError, match=r"mixture\[1\] .*holds no pairs"):
            make_stream(None, mixture=[mixture[0], {"shards": str(empty), "weight": 1}])
