"""The stream: every pair once an epoch, the same batches for any world, resumable to the pair."""

import os
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data.images import ImageTransform
from pipeline.data.order import ShuffledOrder
from pipeline.data.stream import ShardStream
from pipeline.shards import Record, content_uid, write_manifest, write_shard, write_table


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_picture):
    folder = tmp_path_factory.mktemp("shards")
    entries, number = [], 0
    for shard, count in enumerate((9, 12, 5, 11)):
        made = []
        for _ in range(count):
            image, caption = make_picture(number), f"caption {number}"
            uid = content_uid(image, caption)
            made.append(Record(uid, image, "png", caption, {"uid": uid}))
            number += 1
        entries.append(write_shard(folder, f"shard-{shard:06d}", made))
    step = {"name": "ingest", "read": number, "kept": number, "dropped": {}}
    write_manifest(folder, {"num_samples": number, "shards": entries, "steps": [step]})
    return folder


def tokenizer(captions):
    return torch.tensor([[int(caption.split()[1])] for caption in captions])


def stream(shards, batch=8, **knobs):
    transform = ImageTransform(image_size=16, crop_scale=(0.5, 1.0), flip=0.5)
    return ShardStream(
        shards=str(shards),
        transform=transform,
        tokenizer=tokenizer,
        global_batch_size=batch,
        **{"window_shards": 2, "seed": 3, **knobs},
    )


def take(stream, batches):
    return [batch for batch, _ in zip(stream, range(batches), strict=False)]


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_an_epoch_is_a_permutation_and_epochs_differ(window):
    order = ShuffledOrder(np.array([0, 9, 21, 26, 37]), seed=0, window_shards=window)
    epochs = [[order(epoch, i) for i in range(37)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_full_window_is_an_even_shuffle():
    starts = np.array([0, 10, 20, 30])
    places = Counter()
    for seed in range(600):
        order = ShuffledOrder(starts, seed=seed, window_shards=3)
        places[next(i for i in range(30) if order(0, i) == 7)] += 1
    expected = 600 / 30
    chi_square = sum((places[i] - expected) ** 2 / expected for i in range(30))
    assert chi_square < 58.3  # 0.1 % point of 29 degrees of freedom


@pytest.mark.parametrize("workers", [0, 2])
def test_any_world_size_sees_the_same_global_batches(shards, workers):
    alone = take(stream(shards), 6)
    for world_size in (2, 4):
        ranks = [
            take(stream(shards, rank=r, world_size=world_size, workers=workers), 6)
            for r in range(world_size)
        ]
        for step, whole in enumerate(alone):
            assert [uid for rank in ranks for uid in rank[step]["uids"]] == whole["uids"]
            for key in ("images", "tokens"):
                assert torch.equal(torch.cat([rank[step][key] for rank in ranks]), whole[key])


def test_resume_is_exact(shards):
    whole = take(stream(shards), 12)
    state = {"epoch": (5 * 8) // 37, "index": (5 * 8) % 37, "seed": 3}
    second = stream(shards, workers=2)
    second.load_state_dict(state)
    for batch, wanted in zip(take(second, 7), whole[5:], strict=True):
        assert batch["uids"] == wanted["uids"]
        assert torch.equal(batch["images"], wanted["images"])
        assert batch["first"] == wanted["first"]


def test_state_counts_what_was_delivered(shards):
    ours = stream(shards)
    iterator = iter(ours)
    for _ in range(5):
        next(iterator)
    assert ours.state_dict() == {"epoch": 1, "index": 3, "seed": 3}


def test_another_seed_is_refused(shards):
    with pytest.raises(ValueError, match="seed 4"):
        stream(shards).load_state_dict({"epoch": 0, "index": 0, "seed": 4})


def damaged(folder, make_picture, count=24, bad=(5, 6, 17)):
    """A shard where some pairs have no picture, no caption or no uid."""
    made = []
    for n in range(count):
        image, caption = make_picture(n), f"caption {n}"
        if n in bad:
            kind = bad.index(n) % 3
            image = b"not an image" if kind == 0 else image
            caption = " " if kind == 1 else caption
        uid = "" if n in bad and kind == 2 else content_uid(image, caption)
        made.append(Record(uid, image, "png", caption, {"uid": uid}))
    entry = write_shard(folder, "shard-000000", made)
    step = {"name": "ingest", "read": count, "kept": count, "dropped": {}}
    write_manifest(folder, {"num_samples": count, "shards": [entry], "steps": [step]})
    return {record.uid for record in made} - {made[n].uid for n in bad}


def test_bad_pairs_are_replaced_and_counted_by_reason(tmp_path, make_picture):
    good = damaged(tmp_path, make_picture)
    ours = stream(tmp_path, batch=6)
    batches = take(ours, 8)  # two epochs
    reasons = Counter(reason for batch in batches for reason in batch["bad_reasons"])
    assert set(reasons) == {"not_an_image", "empty_caption", "no_uid"}
    assert ours.bad == reasons and sum(batch["bad"] for batch in batches) == reasons.total()
    for batch in batches:
        assert len(set(batch["uids"])) == 6 and set(batch["uids"]) <= good  # nothing twice
    # positions stay: the batches of an order without damage, but for the stand-ins
    order = ours.parts[0].order
    for first, batch in enumerate(batches):
        for place, uid in enumerate(batch["uids"]):
            epoch, index = divmod(first * 6 + place, 24)
            wanted = [
                ours.parts[0].dataset.shard(0).uids[order(epoch, (index + k * 6) % 24)]
                for k in range(4)
            ]
            assert uid == next(u for u in wanted if u in good)
    ranks = [take(stream(tmp_path, batch=6, rank=r, world_size=2, workers=r), 4) for r in (0, 1)]
    both = [a["uids"] + b["uids"] for a, b in zip(*ranks, strict=True)]
    assert both == [b["uids"] for b in batches[:4]]


def test_too_many_bad_pairs_stop_the_run(tmp_path, make_picture, monkeypatch):
    damaged(tmp_path, make_picture, bad=(1, 4, 7, 12))
    monkeypatch.setattr("pipeline.data.stream.JUDGED_AFTER", 48)
    with pytest.raises(ValueError, match=r"of 48 pairs could not be used.*max_bad_fraction=0\.1"):
        take(stream(tmp_path, batch=6), 20)
    take(stream(tmp_path, batch=6, max_bad_fraction=0.5), 20)


def test_nothing_but_bad_pairs_ends_with_their_reasons(tmp_path, make_picture):
    damaged(tmp_path, make_picture, bad=tuple(range(24)))
    with pytest.raises(ValueError, match=r"24 pairs in a row.*'not_an_image': \d"):
        take(stream(tmp_path, batch=6), 1)


def big_pool(folder, make_picture, rows=10_000, shards=1_280):
    """An indexed pool of 12.8 million pairs: every row of every shard is the one picture there is,
    and every shard is the one file there is.
    """
    image = make_picture(1)
    entry = write_shard(folder, "one", [Record("u", image, "png", "caption 1", {"uid": "u"})])
    index = pq.read_table(folder / "one.parquet")
    index = pa.concat_tables([index] * rows)
    # the ends are compared with the tar's
    uids = pa.array(["u", *(f"{n:032x}" for n in range(1, rows - 1)), "u"])
    write_table(folder / "one.parquet", index.set_column(0, "uid", uids))
    entries = []
    for number in range(shards):
        name = f"shard-{number:06d}"
        for suffix in (".tar", ".parquet"):
            os.link(folder / f"one{suffix}", folder / f"{name}{suffix}")
        entries.append(entry | {"name": name, "num_samples": rows})
    total = rows * shards
    step = {"name": "ingest", "read": total, "kept": total, "dropped": {}}
    write_manifest(folder, {"num_samples": total, "shards": entries, "steps": [step]})


def test_a_stream_seeks_to_pair_ten_million_in_under_a_second(tmp_path, make_picture):
    big_pool(tmp_path, make_picture)
    started = time.process_time()
    ours = stream(tmp_path, batch=8, window_shards=16)
    ours.load_state_dict({"epoch": 0, "index": 10_000_000, "seed": 3})
    batch = next(iter(ours))
    seconds = time.process_time() - started
    assert batch["first"] == 10_000_000 and len(set(batch["uids"])) > 1
    assert seconds < 1, f"{seconds:.2f} s"


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"batch": 9, "world_size": 2}, "9 is not a multiple of 2 processes: set it to 10"),
        ({"batch": 4, "world_size": 8}, "4 is not a multiple of 8 processes: set it to 8"),
        ({"batch": 64}, "37 pairs, fewer than one batch of 64"),
        ({"window_shards": 0}, "window_shards 0"),
    ],
)
def test_arithmetic_that_cannot_work_is_named(shards, knobs, words):
    with pytest.raises(ValueError, match=words):
        stream(shards, **knobs)


def banked(folder, make_picture, count=40):
    """Shards whose pairs have two captions and an inclusion probability."""
    made = []
    for number in range(count):
        image, caption = make_picture(number), f"caption {number}"
        uid = content_uid(image, caption)
        texts = [("alt", caption), ("rewrite", f"rewritten {number}")]
        captions = [{"text": text, "role": role, "source": "test"} for role, text in texts]
        stats = {"inclusion_probability": 1.0 if number % 4 == 0 else 0.5}
        made.append(
            Record(uid, image, "png", caption, {"uid": uid, "captions": captions, "stats": stats})
        )
    made.sort(key=lambda record: record.uid)
    shards = [write_shard(folder, "shard-000000", made[:25])]
    shards.append(write_shard(folder, "shard-000001", made[25:]))
    step = {"name": "ingest", "read": count, "kept": count, "dropped": {}}
    write_manifest(folder, {"num_samples": count, "shards": shards, "steps": [step]})
    return {record.uid: number for record in made for number in [int(record.caption.split()[1])]}


def test_a_caption_sampler_chooses_among_the_bank(tmp_path, make_picture):
    banked(tmp_path, make_picture)

    def second(captions, primary, rng, epoch):
        assert captions[0]["text"] == primary
        return f"x {1000 * (epoch + 1) + int(captions[1]['text'].split()[1])}"

    batch = take(stream(tmp_path, captions=second), 6)
    tokens = torch.cat([b["tokens"] for b in batch]).flatten().tolist()
    assert sorted(tokens[:40]) == [1000 + n for n in range(40)]
    assert min(tokens[40:]) >= 2000  # the sampler is told the epoch


def test_late_balance_draws_anew_each_epoch_and_resumes(tmp_path, make_picture):
    numbers = banked(tmp_path, make_picture)
    whole = stream(tmp_path, late_balance=True)
    batches = take(whole, 40)
    seen = [numbers[uid] for batch in batches for uid in batch["uids"]]
    lengths = [whole.parts[0].order.length(epoch) for epoch in range(10)]
    epochs, start = [], 0
    for length in lengths:
        epochs.append(seen[start : start + length])
        start += length
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)  # no pair twice in an epoch
    assert all({n for n in range(40) if n % 4 == 0} <= set(epoch) for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == len(epochs)  # a new draw each time
    half = sum(n % 4 != 0 for epoch in epochs for n in epoch) / (30 * len(epochs))
    assert abs(half - 0.5) < 4 * (0.25 / (30 * len(epochs))) ** 0.5
    first = stream(tmp_path, late_balance=True)
    take(first, 7)
    again = stream(tmp_path, late_balance=True)
    again.load_state_dict(first.state_dict())
    done = first.position // 8
    assert done > 0 and first.state_dict()["epoch"] > 0
    rest = [b["uids"] for b in batches[done : done + 5]]
    assert [b["uids"] for b in take(again, 5)] == rest
    ranks = [take(stream(tmp_path, late_balance=True, rank=r, world_size=2), 12) for r in (0, 1)]
    both = [a["uids"] + b["uids"] for a, b in zip(*ranks, strict=True)]
    assert both == [b["uids"] for b in batches[:12]]


def test_late_balance_needs_probabilities(shards):
    with pytest.raises(ValueError, match="inclusion_probability"):
        stream(shards, late_balance=True)


def test_late_balance_in_a_cache_draws_the_same(tmp_path, make_picture):
    banked(tmp_path / "data", make_picture)
    knobs = {"late_balance": True, "cache": str(tmp_path / "cache")}
    plain = take(stream(tmp_path / "data", late_balance=True), 12)
    for _ in range(2):  # gathered, then found
        cached = take(stream(tmp_path / "data", **knobs), 12)
        assert [b["uids"] for b in cached] == [b["uids"] for b in plain]
    kept = list((tmp_path / "cache").glob("balance-*/*.npy"))
    assert sorted(path.name for path in kept) == ["hashes.npy", "probabilities.npy"]
    np.save(kept[0].with_name("probabilities.npy"), np.ones(40, np.float32))
    assert stream(tmp_path / "data", **knobs).parts[0].order.length(0) == 40  # it is read


def test_a_late_balanced_stream_goes_on_where_a_checkpoint_says(tmp_path, make_picture):
    banked(tmp_path, make_picture)
    whole = take(stream(tmp_path, late_balance=True), 30)
    first = stream(tmp_path, late_balance=True)
    state = first.state_at(20 * 8) | {"position": 20 * 8}
    again = stream(tmp_path, late_balance=True)
    again.load_state_dict(state)
    for batch, wanted in zip(take(again, 10), whole[20:], strict=True):
        assert batch["uids"] == wanted["uids"] and batch["first"] == wanted["first"]
