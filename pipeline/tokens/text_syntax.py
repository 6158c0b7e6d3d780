"""Keep nouns before adjectives, verbs and the rest (CLIPA, arXiv:2305.07017, sec. 3.2: syntax).

Letters: B captions, L positions, V vocabulary.
"""

import torch
from torch import Tensor

from pipeline.tokens.text_packing import checked_context, packed


class SyntaxText:
    """The context_length - 2 most telling words of a long caption, in the caption's order.

    Nouns first, then adjectives, verbs, the rest; within a class what comes first.
    classes: (V,) integers, the class of every token id, smallest first; see
        pipeline.data.word_classes. A word's class is that of its spelling, without the sentence it
        stands in, as in CLIPA's JAX code; its torch code tags whole sentences.
    Raises ValueError for classes of another shape, or a token id that they do not hold.
    Price: nothing is random, so a word that is dropped is never seen in any epoch, and word order
    and small words are learnt in a later phase or not at all. English only.
    """

    def __init__(self, *, context_length: int, classes: Tensor) -> None:
        self.context_length = checked_context(context_length)
        if classes.ndim != 1:
            raise ValueError(
                f"classes have shape {tuple(classes.shape)}: one class per token id is needed, "
                "(vocab_size,)"
            )
        self.classes = classes.to(torch.int64)

    def reduce(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """(B, L) ids -> (B, context_length) ids; see `packed`. The noise is not used."""
        self.classes = self.classes.to(tokens.device)
        if tokens.device.type == "cpu" and len(tokens) and int(tokens.max()) >= len(self.classes):
            # On a GPU the gather itself stops; asking first would wait for it every step.
            raise ValueError(
                f"token id {int(tokens.max())} has no class, {len(self.classes)} ids have: give "
                "text_tokens.classes the tokenizer of the run"
            )
        return packed(tokens, self.classes[tokens].to(noise.dtype), self.context_length)
