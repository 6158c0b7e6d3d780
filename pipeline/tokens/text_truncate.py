"""Keep a caption's first words (CLIPA, arXiv:2305.07017, sec. 3.2: truncation)."""

import torch
from torch import Tensor

from pipeline.tokens.text_packing import checked_context, packed


class TruncateText:
    """A long caption's first context_length - 2 words, as a shorter tokenizer would give them.

    Price: the rest of a long caption is never seen, in any epoch.
    """

    def __init__(self, *, context_length: int) -> None:
        self.context_length = checked_context(context_length)

    def reduce(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """(B, L) ids -> (B, context_length) ids; see `packed`. The noise is not used."""
        position = torch.arange(tokens.shape[1], device=tokens.device, dtype=noise.dtype)
        return packed(tokens, position.expand_as(tokens), self.context_length)
