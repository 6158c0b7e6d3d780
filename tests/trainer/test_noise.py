"""The noise that drops tokens: a function of seed, step and a pair's place in the global batch."""

import pytest
import torch

from pipeline.trainer.module import NOISE_BLOCK, _derived_seed, step_noise

PAIRS, TOKENS = 2 * NOISE_BLOCK + 300, 7


@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 47])
def test_ranks_draw_their_rows_of_the_same_batch(ranks):
    whole = step_noise(3, 11, 0, PAIRS, TOKENS)
    local = PAIRS // ranks
    parts = [step_noise(3, 11, rank * local, local, TOKENS) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole[: ranks * local])


def test_a_small_batch_is_one_draw():
    """The rule of runs that are older than the blocks, which go on to the same weights."""
    source = torch.Generator().manual_seed(_derived_seed(3, "tokens", 11))
    assert torch.equal(step_noise(3, 11, 0, 256, TOKENS), torch.rand(256, TOKENS, generator=source))


def test_draws_are_independent_and_uniform():
    draws = [
        step_noise(*which, 0, PAIRS, TOKENS, what=what)
        for which in ((3, 11), (3, 12), (4, 11))
        for what in ("tokens", "words")
    ]
    blocks = [
        block.flatten() for draw in draws for block in draw[: 2 * NOISE_BLOCK].split(NOISE_BLOCK)
    ]
    correlations = torch.corrcoef(torch.stack(blocks)) - torch.eye(len(blocks))
    assert correlations.abs().max() < 5 / blocks[0].numel() ** 0.5
    assert all(abs(block.mean() - 0.5) < 0.02 for block in blocks)
