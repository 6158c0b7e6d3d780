"""Keep a random subset of tokens, equally many for every sample (FLIP, arXiv:2212.00794, sec. 3.1).

Letters: B samples, N tokens, K kept tokens.
"""

import torch
from torch import Tensor

from pipeline.tokens.keep import checked_keep, count_kept


def smallest_noise(noise: Tensor, num_kept: int) -> Tensor:
    """Indices (B, num_kept) of each row's smallest noise, smallest first; ties in index order."""
    return noise.argsort(dim=1, stable=True)[:, :num_kept]


class RandomTokens:
    """Keeps K = max(1, int(keep * N)) of N tokens, in random order: add positions before.

    keep: fraction in (0, 1]; 1 drops nothing, and the indices are None. Raises ValueError outside.
    For patches. A caption's start and end must stay, which this rule does not know about.
    Price: at keep=0.5 zero-shot accuracy needs a short phase without dropping at the end (FLIP's
    unmasked tuning).
    """

    def __init__(self, *, keep: float) -> None:
        self.keep = checked_keep(keep)

    def num_kept(self, num_tokens: int) -> int:
        return count_kept(self.keep, num_tokens)

    def kept(self, batch: int, num_tokens: int, generator: torch.Generator) -> Tensor | None:
        """Draw uniform noise (batch, num_tokens) from `generator`, on its device; keep by it."""
        if self.keep == 1:
            return None
        noise = torch.rand(batch, num_tokens, generator=generator, device=generator.device)
        return self.from_noise(noise)

    def from_noise(self, noise: Tensor) -> Tensor | None:
        """noise: (B, N). Returns (B, K) int64, or None if nothing is dropped.

        Drawing the noise of the global batch and passing each rank its rows drops the same tokens
        in any world size.
        """
        if self.keep == 1:
            return None
        return smallest_noise(noise, self.num_kept(noise.shape[1]))
