"""The policies of captions against a loop over words."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.models.text import TextTransformer
from pipeline.tokens.text_block import BlockText
from pipeline.tokens.text_random import RandomText
from pipeline.tokens.text_shuffle import ShuffleText
from pipeline.tokens.text_syntax import SyntaxText
from pipeline.tokens.text_truncate import TruncateText

START, END, LENGTH = 98, 99, 20
CLASSES = torch.tensor([random.Random(n).randint(1, 4) for n in range(100)], dtype=torch.int8)


def syntax(*, context_length: int) -> SyntaxText:
    return SyntaxText(context_length=context_length, classes=CLASSES)


def captions(batch: int = 200, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Captions of 0 to length - 2 words, and their noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        words = row % (length - 1)
        ids = torch.randint(1, START, (words,), generator=generator).tolist()
        tokens[row, : words + 2] = torch.tensor([START, *ids, END])
    return tokens, torch.rand(batch, length, generator=generator)


def first_words(words: list[int], noise: list[float], room: int) -> list[int]:
    return words[:room]


def some_words(words: list[int], noise: list[float], room: int) -> list[int]:
    drawn = sorted(range(len(words)), key=lambda n: noise[1 + n])[:room]
    return [words[n] for n in sorted(drawn)]


def shuffled_words(words: list[int], noise: list[float], room: int) -> list[int]:
    return [words[n] for n in sorted(range(len(words)), key=lambda n: noise[1 + n])[:room]]


def block_of_words(words: list[int], noise: list[float], room: int) -> list[int]:
    start = int(noise[0] * (len(words) - room + 1))
    return words[start : start + room]


def telling_words(words: list[int], noise: list[float], room: int) -> list[int]:
    best = sorted(range(len(words)), key=lambda n: (CLASSES[words[n]], n))[:room]
    return [words[n] for n in sorted(best)]


POLICIES = {
    TruncateText: first_words,
    RandomText: some_words,
    ShuffleText: shuffled_words,
    BlockText: block_of_words,
    syntax: telling_words,
}
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.__name__)


@EVERY_POLICY
@pytest.mark.parametrize("context_length", [3, 4, 8, 19, 20])
def test_equals_a_loop_over_words(policy: Callable, context_length: int) -> None:
    tokens, noise = captions()
    found = policy(context_length=context_length).reduce(tokens, noise)
    assert found.shape == (len(tokens), context_length)
    assert found.dtype == torch.int64
    room = context_length - 2
    for row, drawn, ids in zip(tokens.tolist(), noise.tolist(), found.tolist(), strict=True):
        words = row[1 : row.index(END)]
        if len(words) > room:
            words = POLICIES[policy](words, drawn, room)
        assert ids == [START, *words, END] + [0] * (room - len(words))


@EVERY_POLICY
def test_rows_do_not_know_their_batch(policy: Callable) -> None:
    """What a rank or a micro-batch sees does not depend on who else is in it."""
    tokens, noise = captions(24)
    reduce = policy(context_length=7).reduce
    split = [
        reduce(some, drawn) for some, drawn in zip(tokens.split(5), noise.split(5), strict=True)
    ]
    assert torch.equal(reduce(tokens, noise), torch.cat(split))


@EVERY_POLICY
def test_padding_by_the_end_of_text_is_no_word(policy: Callable) -> None:
    """transformers pads CLIP's captions with the end of text."""
    tokens, noise = captions(40)
    padded = tokens.masked_fill((tokens == END).cumsum(1).bool(), END)
    reduce = policy(context_length=7).reduce
    assert torch.equal(reduce(padded, noise), reduce(tokens, noise))


@EVERY_POLICY
def test_an_empty_batch_has_the_right_shape(policy: Callable) -> None:
    empty = torch.zeros(0, LENGTH, dtype=torch.int64)
    assert policy(context_length=7).reduce(empty, torch.rand(0, LENGTH)).shape == (0, 7)


@EVERY_POLICY
def test_what_does_not_fit_says_why(policy: Callable) -> None:
    with pytest.raises(ValueError, match="context_length 2 leaves no room"):
        policy(context_length=2)
    with pytest.raises(ValueError, match="context_length 21 is above the captions' 20 positions"):
        policy(context_length=21).reduce(*captions(3))


@EVERY_POLICY
def test_the_tower_sees_a_short_caption(policy: Callable) -> None:
    """Packed words have the positions 0 to C - 1, whatever place they came from."""
    torch.manual_seed(0)
    model = TextTransformer(vocab_size=100, context_length=LENGTH, width=16, layers=2, heads=2)
    model.double()
    torch.nn.init.normal_(model.position)  # so that a wrong position shows
    tokens, noise = captions(19)
    found = policy(context_length=6).reduce(tokens, noise)
    alone = [model(row[: row.tolist().index(END) + 1].unsqueeze(0)) for row in found]
    torch.testing.assert_close(model(found), torch.cat(alone), rtol=0, atol=1e-12)


def test_every_word_and_every_start_is_equally_likely() -> None:
    tokens = torch.tensor([[START, *range(1, 11), END]]).expand(20000, 12)
    noise = torch.rand(20000, 12, generator=torch.Generator().manual_seed(3))
    # five standard deviations of a share of 20,000 are 0.018 at most
    for policy in (RandomText, ShuffleText):
        found = policy(context_length=6).reduce(tokens, noise)[:, 1:5]
        share = torch.bincount(found.flatten(), minlength=11)[1:] / 20000
        assert (share - 0.4).abs().max() < 0.018
    starts = BlockText(context_length=6).reduce(tokens, noise)[:, 1]
    share = torch.bincount(starts, minlength=8)[1:] / 20000
    assert (share - 1 / 7).abs().max() < 0.018


def test_the_last_block_ends_with_the_caption() -> None:
    tokens = torch.tensor([[START, *range(1, 76), END]])
    noise = torch.full((1, 77), 1 - 2.0**-24)
    found = BlockText(context_length=6).reduce(tokens, noise)
    assert found.tolist() == [[START, 72, 73, 74, 75, END]]


def test_nouns_come_before_everything_else() -> None:
    classes = torch.tensor([4, 1, 2, 3, 4, 1, 0, 0])  # ids 1 and 5 are nouns
    policy = SyntaxText(context_length=5, classes=classes)
    caption = torch.tensor([[6, 4, 3, 2, 5, 4, 1, 3, 7]])
    assert policy.reduce(caption, torch.rand(1, 9)).tolist() == [[6, 2, 5, 1, 7]]


def test_classes_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(10, 4\)"):
        SyntaxText(context_length=5, classes=torch.ones(10, 4))
    policy = SyntaxText(context_length=5, classes=torch.ones(50))
    with pytest.raises(ValueError, match="token id 99 has no class, 50 ids have"):
        policy.reduce(*captions(20))
