import math

import pytest
import torch
from torch import Tensor

from pipeline.tokens.grid import GridTokens, spread


def uniforms(batch: int, num_tokens: int) -> Tensor:
    return torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(0))


def per_cell(kept: Tensor, side: int) -> Tensor:
    """(B, K) indices -> (B, cells): how many of each cell are kept."""
    half = (side + 1) // 2
    cell = kept // side // 2 * half + kept % side // 2
    counts = torch.zeros(len(kept), half * half, dtype=torch.int64)
    return counts.scatter_add_(1, cell, torch.ones_like(cell))


def test_a_quarter_is_the_smallest_noise_of_each_cell() -> None:
    noise = uniforms(20, 64)
    kept = GridTokens(keep=0.25).from_noise(noise)
    for row, indices in zip(noise, kept, strict=True):
        expected = set()
        for top in range(0, 8, 2):
            for left in range(0, 8, 2):
                cell = [8 * (top + y) + left + x for y in (0, 1) for x in (0, 1)]
                expected.add(min(cell, key=lambda index: row[index]))
        assert set(indices.tolist()) == expected


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("side", [4, 14])
def test_cells_keep_their_share(keep: float, side: int) -> None:
    policy = GridTokens(keep=keep)
    kept = policy.from_noise(uniforms(50, side * side))
    assert kept.dtype == torch.int64
    assert kept.shape == (50, policy.num_kept(side * side)) == (50, int(side * side * keep))
    assert all(len(set(row)) == len(row) for row in kept.tolist())
    counts = per_cell(kept, side)
    # K / cells lies between the two counts that occur; int() may have cut K below 4 * keep a cell
    assert counts.min() >= math.floor(kept.shape[1] / counts.shape[1])
    assert counts.max() <= math.ceil(kept.shape[1] / counts.shape[1])


@pytest.mark.parametrize(("side", "keep"), [(6, 0.25), (6, 0.4), (7, 0.25), (7, 0.5), (1, 0.5)])
def test_every_patch_is_kept_equally_often(side: int, keep: float) -> None:
    images, num_tokens = 20000, side * side
    kept = GridTokens(keep=keep).from_noise(uniforms(images, num_tokens))
    share = torch.bincount(kept.flatten(), minlength=num_tokens) / images
    # five standard deviations of a share are 0.018 at most
    assert (share - kept.shape[1] / num_tokens).abs().max() < 0.018


def test_spread_noise_is_uniform_and_stratified() -> None:
    values = spread(uniforms(4000, 16))
    assert ((values >= 0) & (values < 1)).all()
    histogram = torch.histc(values, bins=10, min=0, max=1) / values.numel()
    assert (histogram - 0.1).abs().max() < 0.006
    first = values.view(-1, 4, 4)[:, :2, :2].flatten(1)
    assert torch.equal((first.sort(1).values * 4).floor().long(), torch.arange(4).expand(4000, 4))


def test_noise_next_to_one_stays_in_its_quarter() -> None:
    noise = torch.tensor([[0, 1 - 2.0**-24, 0, 0]])
    assert (spread(noise) * 4).floor().sort().values.tolist() == [[0, 1, 2, 3]]


def test_rows_of_the_global_noise_do_not_depend_on_the_world_size() -> None:
    policy, noise = GridTokens(keep=0.4), uniforms(8, 49)
    split = torch.cat([policy.from_noise(part) for part in noise.split(2)])
    assert torch.equal(policy.from_noise(noise), split)


def test_keeping_everything_drops_nothing() -> None:
    assert GridTokens(keep=1.0).from_noise(torch.rand(2, 4)) is None
    assert GridTokens(keep=1.0).num_kept(49) == 49


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        GridTokens(keep=0)
    with pytest.raises(ValueError, match="50 patches are no square grid.*image_tokens=random"):
        GridTokens(keep=0.5).from_noise(torch.rand(2, 50))
