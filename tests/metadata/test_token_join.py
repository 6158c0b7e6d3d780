import random
import tracemalloc
from itertools import chain, pairwise

import numpy as np
import pytest

from curation.metadata import token_join
from curation.metadata.spacing import spaced
from curation.metadata.token_join import TokenJoin
from curation.metadata.tokens import KeyTable, Vocabulary, cut, encoded, pieces


def scan(entries, captions):
    return [[i for i, e in enumerate(entries) if f" {e} " in spaced(c)] for c in captions]


def rows(offsets, ids):
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def text(rng, most):
    return " ".join(rng.choices(["a", "bb", "c,", "犬", "word\n", "elephantine", ""], k=most))


def test_tokens_are_those_of_the_spaced_caption():
    rng = random.Random(0)
    captions = ["", " ", ",", "a,b", "a\0", "\0", "é\tß", *(text(rng, 9) for _ in range(50))]
    tokens = cut(encoded(captions))
    found = [[] for _ in captions]
    for start, length, row in zip(tokens.start, tokens.length, tokens.row, strict=True):
        found[row].append(tokens.text[start : start + length].tobytes().replace(b"\xff", b"\0"))
    assert [row.pop() for row in found] == [b"\xfe"] * len(captions)  # what no caption holds
    # the spaced caption's first and last space make two empty tokens that are none
    assert found == [spaced(caption).encode().split(b" ")[1:-1] for caption in captions]


@pytest.mark.parametrize("max_bytes", [1, 7, 50, 1000, 1 << 20])
def test_any_batch_size_gives_the_same(max_bytes):
    rng = random.Random(1)
    entries = ["a", "bb c", "c , 犬", "elephantine", "a a", "bb", "word a"]
    captions = [text(rng, rng.randint(0, 8)) for _ in range(120)] + ["", "a" * 3000, "a " * 900]
    join = TokenJoin(entries, max_bytes=max_bytes)
    assert rows(*join.match(encoded(captions))) == scan(entries, captions)
    assert rows(*join.match(encoded(captions)[5:9])) == scan(entries, captions[5:9])


def test_pieces():
    captions = encoded(["aa", "", "bbb", "c" * 9, "", "d"])
    for max_bytes in range(1, 20):
        parts = [part.to_pylist() for part in pieces(captions[1:], max_bytes)]
        assert [*chain(*parts)] == captions[1:].to_pylist()
        assert all(len(part) == 1 or sum(map(len, part)) <= max_bytes for part in parts)
    assert len(pieces(captions, 5)) == 3
    assert len(pieces(captions, 15)) == 1


def test_memory_does_not_grow_with_the_captions():
    rng = random.Random(2)
    captions = encoded([text(rng, 12) for _ in range(10_000)])
    join = TokenJoin(["bb c", "elephantine"], max_bytes=1 << 14)
    peaks = []
    for count in (2_000, 10_000):
        tracemalloc.start()
        offsets, ids = join.match(captions[:count])
        peaks.append(tracemalloc.get_traced_memory()[1] - 4 * (offsets.nbytes + ids.nbytes))
        tracemalloc.stop()
    assert peaks[0] < 100 << 14
    assert peaks[1] < 1.2 * peaks[0]


def test_pairs_are_thinned_on_the_way(monkeypatch):
    monkeypatch.setattr(token_join, "_MAX_PAIRS", 50)
    entries = [" ".join("a" * n) for n in range(1, 40)]
    captions = ["a " * 100, "a " * 30 + "b " + "a " * 38, "b"]
    assert rows(*TokenJoin(entries).match(encoded(captions))) == scan(entries, captions)


def test_key_table():
    rng = np.random.default_rng(0)
    for count in (0, 1, 5, 3000):
        keys = np.unique(rng.integers(0, 1 << 12, (count, 2), np.uint64), axis=0)
        keys[:, 0] <<= np.uint64(52)  # only high bits differ: a weak hash would pile them up
        values = rng.permutation(len(keys)) + 1
        truth = {tuple(key): value for key, value in zip(keys.tolist(), values, strict=True)}
        asked = np.concatenate([keys, rng.integers(0, 1 << 12, (3000, 2), np.uint64)])
        found = KeyTable(keys, values).find(asked[:, 0], asked[:, 1])
        assert found.tolist() == [truth.get(tuple(key), 0) for key in asked.tolist()]


def test_vocabulary_numbers_by_position():
    tokens = [b"a", b"", b"\0", b"x" * 8, b"x" * 9, b"x" * 16, b"x" * 17, b"x" * 17 + b"\0"]
    captions = [token.decode() for token in tokens] + ["b", "x" * 7, "x" * 18, "x" * 15, "a\0"]
    numbers = Vocabulary(tokens).numbers(cut(encoded(captions)))
    assert numbers[::2].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0]
    assert not numbers[1::2].any()  # the ends
