import pytest
import torch

from pipeline.tokens.block import BlockTokens


def test_a_quarter_of_any_place() -> None:
    """keep 0.25 of 4 x 4 is one of the nine 2 x 2 squares, all equally often."""
    noise = torch.rand(9000, 16, generator=torch.Generator().manual_seed(0))
    kept = BlockTokens(keep=0.25).from_noise(noise)
    assert kept.dtype == torch.int64
    squares = [
        (4 * y + x, 4 * y + x + 1, 4 * y + x + 4, 4 * y + x + 5) for y in range(3) for x in range(3)
    ]
    found = [tuple(row) for row in kept.tolist()]
    counts = [found.count(square) for square in squares]
    assert sum(counts) == 9000
    assert max(abs(count - 1000) for count in counts) < 150  # five standard deviations


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("side", [1, 2, 7, 14])
def test_kept_patches_are_one_block(keep: float, side: int) -> None:
    num_tokens = side * side
    policy = BlockTokens(keep=keep)
    num_kept = policy.num_kept(num_tokens)
    noise = torch.rand(40, num_tokens, generator=torch.Generator().manual_seed(1))
    noise[0], noise[1] = 0, 1 - 2.0**-24  # the first and the last place
    kept = policy.from_noise(noise)
    assert kept.shape == (40, num_kept) == (40, max(1, int(num_tokens * keep)))
    assert ((kept >= 0) & (kept < num_tokens)).all()
    for row in kept.tolist():
        places = [divmod(index, side) for index in row]
        assert len(set(places)) == num_kept
        left, right = min(x for _, x in places), max(x for _, x in places)
        top = min(y for y, _ in places)
        # rows are full from the top, and no row or column more than a square needs
        width = right - left + 1
        expected = [(top + n // width, left + n % width) for n in range(num_kept)]
        assert places == expected
        assert (width - 1) ** 2 < num_kept <= width**2


def test_both_ends_of_the_grid_are_reached() -> None:
    noise = torch.zeros(2, 49)
    noise[1] = 1 - 2.0**-24
    first, last = BlockTokens(keep=0.5).from_noise(noise).tolist()
    assert first[0] == 0
    assert last[-1] // 7 == 6
    assert max(index % 7 for index in last) == 6


def test_rows_of_the_global_noise_do_not_depend_on_the_world_size() -> None:
    policy = BlockTokens(keep=0.4)
    noise = torch.rand(8, 49, generator=torch.Generator().manual_seed(1))
    split = torch.cat([policy.from_noise(part) for part in noise.split(2)])
    assert torch.equal(policy.from_noise(noise), split)


def test_keeping_everything_drops_nothing() -> None:
    assert BlockTokens(keep=1.0).from_noise(torch.rand(2, 4)) is None


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        BlockTokens(keep=1.1)
    with pytest.raises(ValueError, match="12 patches are no square grid.*image_tokens=random"):
        BlockTokens(keep=0.5).from_noise(torch.rand(2, 12))
