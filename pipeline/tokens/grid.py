"""Keep the same share of every 2 x 2 cell of patches (CLIPA, arXiv:2305.07017, sec. 3.1).

Letters: B images, N patches on a grid of S x S, K kept patches, C cells.
"""

import torch.nn.functional as F
from torch import Tensor

from pipeline.tokens.keep import checked_keep, count_kept, grid_side
from pipeline.tokens.random import smallest_noise


class GridTokens:
    """Keeps K = max(1, int(keep * N)) patches, spread evenly: no part of the image goes unseen.

    keep: fraction in (0, 1]; 1 drops nothing. 0.25 is CLIPA's one of each cell. Between quarters
    every cell keeps int(4 * keep) patches and random cells one more. On an odd grid the cells of
    the last row and column hold fewer patches and keep their share in the mean. Every patch is kept
    with the same probability.
    Raises ValueError for keep outside its range or a grid that is not square.
    Price: that of RandomTokens. What a dropped patch shows is next to a kept one, so the task is
    easier than with random patches.
    """

    def __init__(self, *, keep: float) -> None:
        self.keep = checked_keep(keep)

    def num_kept(self, num_tokens: int) -> int:
        return count_kept(self.keep, num_tokens)

    def from_noise(self, noise: Tensor) -> Tensor | None:
        """noise: (B, N), uniform in [0, 1). Returns (B, K) int64, or None if nothing is dropped."""
        if self.keep == 1:
            return None
        return smallest_noise(spread(noise), self.num_kept(noise.shape[1]))


def spread(noise: Tensor) -> Tensor:
    """(B, N) uniforms -> (B, N) uniforms that fill [0, 1) evenly within every 2 x 2 cell.

    Of a cell of 4, one patch falls into each quarter of [0, 1): those below any bound are then
    equally many in all cells, give or take one.
    """
    side = grid_side(noise.shape[1])
    half = (side + 1) // 2
    odd = side % 2
    # float64: rank + offset must not round up into the next quarter
    grid = noise.double().view(-1, side, side)
    padded = F.pad(grid, (0, odd, 0, odd), value=2.0)  # above every noise: ranks last
    cells = padded.view(-1, half, 2, half, 2).transpose(2, 3).flatten(3)
    real = cells < 2
    rank = cells.argsort(dim=3, stable=True).argsort(dim=3)
    # The sum does not know which patch is which, so it is independent of the ranks; its fraction is
    # uniform because the noises are. Padding adds whole numbers.
    offset = cells.sum(dim=3, keepdim=True).frac()
    key = (rank + offset) / real.sum(dim=3, keepdim=True)
    key = key.unflatten(3, (2, 2)).transpose(2, 3).reshape(-1, 2 * half, 2 * half)
    return key[:, :side, :side].flatten(1)
