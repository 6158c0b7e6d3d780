"""Keep random words of a caption, in their order (CLIPA, arXiv:2305.07017, sec. 3.2: random)."""

from torch import Tensor

from pipeline.tokens.text_packing import checked_context, packed


class RandomText:
    """context_length - 2 random words of a long caption, in the caption's order.

    Price: half a name or a negation may go; other words stay in each epoch.
    """

    def __init__(self, *, context_length: int) -> None:
        self.context_length = checked_context(context_length)

    def reduce(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """tokens: (B, L) ids; noise: (B, L): the words with the smallest stay. Returns
        (B, context_length) ids; see `packed`.
        """
        return packed(tokens, noise, self.context_length)
