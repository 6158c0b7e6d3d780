"""Keep a run of a caption's words from a random start (CLIPA, arXiv:2305.07017, sec. 3.2: block).

Letters: B captions, L positions.
"""

import torch
from torch import Tensor

from pipeline.tokens.text_packing import checked_context, packed, word_counts


class BlockText:
    """context_length - 2 neighbouring words of a long caption; every start is equally likely.

    Price: words far from each other are never seen together; phrases stay whole.
    """

    def __init__(self, *, context_length: int) -> None:
        self.context_length = checked_context(context_length)

    def reduce(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """tokens: (B, L) ids; noise: (B, L) in [0, 1), of which the first column chooses the start.
        Returns (B, context_length) ids; see `packed`.
        """
        room = self.context_length - 2
        spare = (word_counts(tokens) - room).clamp(min=0)
        first = (noise[:, 0] * (spare + 1)).long().unsqueeze(1) + 1
        position = torch.arange(tokens.shape[1], device=tokens.device)
        rank = torch.where(position < first, torch.inf, position.to(noise.dtype))
        return packed(tokens, rank, self.context_length)
