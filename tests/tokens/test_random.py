import json
from pathlib import Path

import pytest
import torch

from pipeline.tokens.random import RandomTokens, smallest_noise

PARITY = Path(__file__).parents[1] / "data" / "parity" / "token_masks.json"


def test_equals_flip() -> None:
    cases = json.loads(PARITY.read_text())["flip_random_mask"]
    assert cases
    for case in cases:
        noise = torch.tensor(case["noise"], dtype=torch.float64)
        expected = torch.tensor(case["kept_in_order"])
        assert torch.equal(smallest_noise(noise, expected.shape[1]), expected)
        if case["mask_ratio"] > 0:
            tokens = RandomTokens(keep=1 - case["mask_ratio"])
            assert torch.equal(tokens.from_noise(noise), expected)


def test_counts_are_open_clips() -> None:
    """Cut, not rounded, and to the last bit of their floats."""
    for num_tokens in (10, 16, 49, 50, 196, 256):
        for prob in [n / 100 for n in range(100)]:
            expected = max(1, int(num_tokens * (1 - prob)))
            assert RandomTokens(keep=1 - prob).num_kept(num_tokens) == expected


@pytest.mark.parametrize(
    ("keep", "num_tokens", "num_kept"),
    [(0.5, 64, 32), (0.25, 49, 12), (0.75, 10, 7), (0.4, 49, 19), (0.01, 9, 1)],
)
def test_kept_are_distinct_and_of_the_right_number(
    keep: float, num_tokens: int, num_kept: int
) -> None:
    kept = RandomTokens(keep=keep).kept(50, num_tokens, torch.Generator().manual_seed(0))
    assert kept.shape == (50, num_kept)
    assert kept.dtype == torch.int64
    assert ((kept >= 0) & (kept < num_tokens)).all()
    assert all(len(set(row)) == num_kept for row in kept.tolist())


def test_every_token_is_kept_equally_often() -> None:
    kept = RandomTokens(keep=0.5).kept(4000, 16, torch.Generator().manual_seed(0))
    counts = torch.bincount(kept.flatten(), minlength=16)
    # 4000 draws at 1/2: five standard deviations are 158.
    assert (counts - 2000).abs().max() < 158


def test_same_generator_same_tokens() -> None:
    first, second = (
        RandomTokens(keep=0.5).kept(8, 16, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_rows_of_the_global_noise_do_not_depend_on_the_world_size() -> None:
    tokens = RandomTokens(keep=0.4)
    noise = torch.rand(8, 10, generator=torch.Generator().manual_seed(1))
    split = torch.cat([tokens.from_noise(part) for part in noise.split(2)])
    assert torch.equal(tokens.from_noise(noise), split)


def test_keeping_everything_drops_nothing() -> None:
    tokens = RandomTokens(keep=1.0)
    assert tokens.kept(2, 4, torch.Generator()) is None
    assert tokens.from_noise(torch.rand(2, 4)) is None


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_keep_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        RandomTokens(keep=keep)
