"""The stream: every pair once an epoch, the same batches for any world, resumable to the pair."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.data.images import ImageTransform
from pipeline.data.stream import ShardStream, ShuffledOrder
from pipeline.shards import Record, content_uid, write_manifest, write_shard


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


def test_an_undecodable_record_is_replaced_and_counted(shards, tmp_path, make_picture):
    good = [(make_picture(n), f"caption {n}") for n in range(6)]
    made = [Record(content_uid(i, c), i, "png", c, {}) for i, c in good]
    made[2] = Record("broken", b"not an image", "png", "caption 2", {})
    entry = write_shard(tmp_path, "shard-000000", made)
    step = {"name": "ingest", "read": 6, "kept": 6, "dropped": {}}
    write_manifest(tmp_path, {"num_samples": 6, "shards": [entry], "steps": [step]})
    batch = take(stream(tmp_path, batch=6), 1)[0]
    assert batch["bad"] == 1 and "broken" not in batch["uids"]
    assert len(batch["uids"]) == 6


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"batch": 9, "world_size": 2}, "9 is not a multiple of 2"),
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
