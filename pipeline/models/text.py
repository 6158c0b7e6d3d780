"""CLIP's causal text transformer (arXiv:2103.00020, sec. 2.4).

Letters: B captions, L positions, K kept positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.transformer import Transformer


class TextTransformer(nn.Module):
    """(B, L) token ids -> text features (B, width): the end-of-text token after `ln_final`.

    The end of text is the first occurrence of a row's largest id (CLIP's convention: the tokenizer
    gives it the largest of all ids, and padding is 0). Attention is causal, so what follows it
    changes nothing.
    Attributes: width, context_length, vocab_size. L may be shorter than context_length; longer
    raises ValueError.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.width = width
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.token_embed = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.transformer = Transformer(
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=mlp_ratio,
            activation=activation,
            causal=True,
        )
        self.ln_final = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """tokens: (B, L) int64.

        kept: (B, K) int64 ascending positions in [0, L), among them the start and the end of text;
        None keeps all. Ascending, because the causal order is the order of the kept tokens.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"captions have {length} positions, the tower was built with "
                f"context_length={self.context_length}: give the tokenizer the same context_length"
            )
        if kept is None:
            position = self.position[:length]
        else:
            tokens = tokens.gather(1, kept)
            position = F.embedding(kept, self.position)
        x = self.transformer(self.token_embed(tokens) + position)
        row = torch.arange(len(tokens), device=tokens.device)
        return self.ln_final(x[row, tokens.argmax(dim=1)])
