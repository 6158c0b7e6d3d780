"""CLIP's text transformer (arXiv:2103.00020, sec. 2.4) and its bidirectional relatives.

Letters: B captions, L positions, K kept positions, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.transformer import BlockStyle, Transformer

POOLINGS = ("eot", "last", "first", "mean")


class TextTransformer(nn.Module):
    """(B, L) token ids -> text features (B, W), after `ln_final`.

    causal: token i sees tokens 0..i, so that nothing after the end of text changes anything there.
    pooling: "eot", the end of text: the first occurrence of `eot_id`, or, if that is None, of a
    row's largest id (CLIP's tokenizer gives it the largest of all). "last" and "first" are places
    in the row (SigLIP, CLIPA; BERT). "mean" is over all tokens but padding.
    pad_id: a row's closing run of this id is padding: no other token sees it, and "mean" leaves it
    out. None: there is none, and what fills the row is seen as any token (SigLIP, CLIPA).
    block: what the blocks are made of.
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
        causal: bool = True,
        pooling: str = "eot",
        eot_id: int | None = None,
        pad_id: int | None = None,
        block: BlockStyle | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}: one of {sorted(POOLINGS)}")
        style = block or BlockStyle()
        self.width = width
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.causal, self.pooling = causal, pooling
        self.eot_id, self.pad_id = eot_id, pad_id
        self.token_embed = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.empty(context_length, width))
        self.initialise()
        self.transformer = Transformer(
            width=width,
            layers=layers,
            heads=heads,
            mlp_ratio=mlp_ratio,
            activation=activation,
            causal=causal,
            block=style,
            activation_checkpointing=activation_checkpointing,
        )
        self.ln_final = style.make_norm(width)

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.normal_(self.token_embed.weight, std=0.02)
        self.position.normal_().mul_(0.01)

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """tokens: (B, L) int64.

        kept: (B, K) int64 ascending positions in [0, L), among them the start and the end of text;
        None keeps all. Ascending, because the causal order is the order of the kept tokens.
        """
        x, words = self._embedded(tokens, kept)
        tokens = tokens if kept is None else tokens.gather(1, kept)
        # Under causal attention no word comes after padding, and a mask would only cost.
        seen = None if self.causal else words
        if self.pooling == "mean":
            return mean_of(self.ln_final(self.transformer(x, seen=seen)), words)
        return self.ln_final(self.transformer(x, seen=seen, at=self._pooled_at(tokens))[:, 0])

    def tokens(self, tokens: Tensor) -> Tensor:
        """(B, L, W): all positions after `ln_final`."""
        x, words = self._embedded(tokens, None)
        return self.ln_final(self.transformer(x, seen=None if self.causal else words))

    def _embedded(self, tokens: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, L, W), what the first block is given, and where words are; None: everywhere."""
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
        words = None if self.pad_id is None else not_padding(tokens, self.pad_id)
        return self.token_embed(tokens) + position, words

    def _pooled_at(self, tokens: Tensor) -> Tensor:
        """(B,) places."""
        if self.pooling in ("first", "last"):
            place = 0 if self.pooling == "first" else tokens.shape[1] - 1
            return torch.full((len(tokens),), place, device=tokens.device)
        ends = tokens if self.eot_id is None else (tokens == self.eot_id).int()
        return ends.argmax(dim=1)


def not_padding(tokens: Tensor, pad_id: int) -> Tensor:
    """(B, L) bool: true up to the last token that is not `pad_id`; the id may also be a word's."""
    words = (tokens != pad_id).int()
    return words.flip(1).cummax(dim=1).values.flip(1).bool()


def mean_of(x: Tensor, words: Tensor | None) -> Tensor:
    """(B, L, W) -> (B, W), the mean over the tokens where `words` (B, L) is true; None: over all.

    A row without any word gives 0.
    """
    if words is None:
        return x.mean(dim=1)
    share = words.to(x.dtype).unsqueeze(-1)
    return (x * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)
