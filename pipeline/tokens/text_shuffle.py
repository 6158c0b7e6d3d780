"""Keep random words of a caption, in random order (open_clip's tokenizer offers it beside CLIPA's
strategies).
"""

from torch import Tensor

from pipeline.tokens.text_packing import checked_context, packed


class ShuffleText:
    """context_length - 2 random words of a long caption, in random order.

    A caption that is short enough keeps its order.
    Price: a long caption becomes a bag of words, and the tower learns nothing from its order.
    """

    def __init__(self, *, context_length: int) -> None:
        self.context_length = checked_context(context_length)

    def reduce(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """tokens: (B, L) ids; noise: (B, L): the words with the smallest stay, smallest first.
        Returns (B, context_length) ids; see `packed`.
        """
        return packed(tokens, noise, self.context_length, in_order=False)
