"""Captions with nearly the same words, and models that do and do not see the difference."""

import hashlib

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.evals.compositional import KINDS, Compositional, words
from pipeline.shards import Record, write_manifest, write_shard
from tests.evals.on_sphere import OnSphere

CAPTIONS = [
    "a black dog beside a white horse",
    "the old man feeds hungry birds",
    "Tree, tree and house!",
    "beautiful",
    "42",
]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "swap_nouns",
            [
                "a black horse beside a white dog",
                "the old birds feeds hungry man",
                "house, tree and Tree!",
                None,
                None,
            ],
        ),
        (
            "swap_attributes",
            [
                "a white dog beside a black horse",
                "the hungry man feeds old birds",
                None,
                None,
                None,
            ],
        ),
        (
            "negation",
            [
                "a no black dog beside a white horse",
                "the no old man feeds hungry birds",
                "no Tree, tree and house!",
                None,
                None,
            ],
        ),
    ],
)
def test_what_is_changed(kind, expected):
    assert [KINDS[kind](caption, 0) for caption in CAPTIONS] == expected


def test_a_shuffle_keeps_the_words_and_their_number():
    for caption in CAPTIONS[:3]:
        found = KINDS["shuffle"](caption, 0)
        assert sorted(w for w in found.split()) != [] and len(found) == len(caption)
        pick = lambda text: sorted(text[a:b] for a, b, _ in words(text))  # noqa: E731
        assert pick(found) == pick(caption)
        assert found == KINDS["shuffle"](caption, 0)
    assert len({KINDS["shuffle"](CAPTIONS[0], seed) for seed in range(20)}) > 15
    assert KINDS["shuffle"]("beautiful", 0) is None


def direction(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
    return torch.randn(512, generator=torch.Generator().manual_seed(seed))


class Reading(OnSphere):
    """An image is the text in it. `read` makes a vector of a text."""

    def __init__(self, read):
        self.read = read

    def image_embed(self, images, *, batch_size=256):
        return self.text_embed([image.decode() for image in images])

    def text_embed(self, captions, *, batch_size=256):
        return normalize(torch.stack([self.read(text) for text in captions]), dim=-1)


def bag(text):
    return torch.stack(
        [direction(text[a:b].lower()) for a, b, _ in words(text)] or [torch.ones(512)]
    ).sum(0)


@pytest.fixture
def shards(tmp_path):
    made = [
        Record(str(n), text.encode(), "png", text, {"uid": str(n)})
        for n, text in enumerate(CAPTIONS)
    ]
    entry = write_shard(tmp_path, "shard-000000", made)
    write_manifest(tmp_path, {"num_samples": len(made), "shards": [entry], "steps": []})
    return str(tmp_path)


def test_a_model_that_reads_finds_all_and_a_bag_of_words_none(shards):
    found = Compositional(data=shards).run(Reading(direction))
    assert {kind: found[kind] for kind in KINDS} == dict.fromkeys(KINDS, 1.0)
    assert (found["swap_nouns_pairs"], found["swap_attributes_pairs"]) == (3, 2)
    bagged = Compositional(data=shards, batch_size=2).run(Reading(bag))
    for kind in ("swap_nouns", "swap_attributes", "shuffle"):
        assert bagged[kind] == 0  # a tie is no hit
        assert bagged[f"{kind}_text_cosine"] == pytest.approx(1, abs=1e-6)
    assert bagged["negation"] == 1 and bagged["negation_text_cosine"] < 0.95


def test_chance_is_a_half(tmp_path):
    """Images that have nothing to do with the texts."""
    made = [
        Record(
            f"{n:04}",
            f"x{n}".encode(),
            "png",
            f"the red {n}a and blue thing{'q' * (n % 9)} dog",
            {},
        )
        for n in range(2000)
    ]
    entry = write_shard(tmp_path, "shard-000000", made)
    write_manifest(tmp_path, {"num_samples": len(made), "shards": [entry], "steps": []})
    found = Compositional(data=str(tmp_path), max_pairs=1500).run(Reading(direction))
    assert found["swap_attributes_pairs"] == 1500
    for kind in KINDS:
        assert found[kind].low < 0.5 < found[kind].high


def test_captions_that_cannot_be_changed_are_named(tmp_path):
    entry = write_shard(tmp_path, "shard-000000", [Record("a", b"x", "png", "42", {})])
    write_manifest(tmp_path, {"num_samples": 1, "shards": [entry], "steps": []})
    with pytest.raises(ValueError, match="no caption that could be changed"):
        Compositional(data=str(tmp_path)).run(Reading(direction))
