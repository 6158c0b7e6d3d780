"""Keep one block of neighbouring patches (one of the strategies CLIPA compares, arXiv:2305.07017,
sec. 3.1).

Letters: B images, N patches on a grid of S x S, K kept patches.
"""

import math

import torch
from torch import Tensor

from pipeline.tokens.keep import checked_keep, count_kept, grid_side


class BlockTokens:
    """Keeps K = max(1, int(keep * N)) patches of one square block, at a random place.

    keep: fraction in (0, 1]; 1 drops nothing. Where K is no square number, the block has
    ceil(sqrt(K)) columns and its last row is not full. Every place on the grid is equally likely,
    so patches of the border are kept less often than those of the middle.
    Raises ValueError for keep outside its range or a grid that is not square.
    Price: that of RandomTokens; it is a crop without resizing, and what lies outside is never seen.
    """

    def __init__(self, *, keep: float) -> None:
        self.keep = checked_keep(keep)

    def num_kept(self, num_tokens: int) -> int:
        return count_kept(self.keep, num_tokens)

    def from_noise(self, noise: Tensor) -> Tensor | None:
        """noise: (B, N), uniform in [0, 1); its first and its last column choose the place.

        Returns (B, K) int64, ascending, or None if nothing is dropped.
        """
        if self.keep == 1:
            return None
        side, num_kept = grid_side(noise.shape[1]), self.num_kept(noise.shape[1])
        columns = math.isqrt(num_kept - 1) + 1
        rows = -(-num_kept // columns)
        top = (noise[:, 0] * (side - rows + 1)).long()
        left = (noise[:, -1] * (side - columns + 1)).long()
        offset = torch.arange(num_kept, device=noise.device)
        inside = offset // columns * side + offset % columns
        return (top * side + left).unsqueeze(1) + inside
