"""Captions cut to fewer words and packed, so that a text tower sees them as short captions (CLIPA,
arXiv:2305.07017, sec. 3.2).

Words are the tokenizer's pieces between start and end of text.
Letters: B captions, L positions, C positions after packing, W = C - 2 words kept.
"""

import torch
from torch import Tensor


def checked_context(context_length: int) -> int:
    """context_length itself. Raises ValueError if start and end of text leave no room."""
    if context_length < 3:
        raise ValueError(
            f"text_tokens.context_length {context_length} leaves no room between start and end of "
            "text: give at least 3"
        )
    return context_length


def word_counts(tokens: Tensor) -> Tensor:
    """(B, L) -> (B,): words before the end of text, the first occurrence of a row's largest id."""
    return tokens.argmax(dim=1) - 1


def packed(tokens: Tensor, rank: Tensor, context_length: int, *, in_order: bool = True) -> Tensor:
    """Keep start, end and the W words of the smallest rank: (B, L) ids -> (B, C) ids.

    tokens: (B, L) int64: start of text, words, end of text (the row's largest id), padding.
    rank: (B, L), of which the words' positions count; ties in order of position.
    in_order: words stay in the caption's order; else they come in order of rank.
    A caption of at most W words keeps them all, in order. Positions are 0 to C - 1 again; the end
    follows the last word, padding is 0.
    Raises ValueError if C > L: the captions were cut shorter than that before.
    """
    batch, length = tokens.shape
    if context_length > length:
        raise ValueError(
            f"text_tokens.context_length {context_length} is above the captions' {length} "
            "positions: raise tokenizer.context_length, from which the words are chosen"
        )
    if context_length == length:
        return tokens
    room = context_length - 2
    counts = word_counts(tokens).unsqueeze(1)
    kept_counts = counts.clamp(max=room)
    position = torch.arange(length, device=tokens.device)
    rank = rank.where(counts > room, position.to(rank.dtype))
    is_word = (position >= 1) & (position <= counts)
    rank = rank.masked_fill(~is_word, torch.inf)
    chosen = rank.argsort(dim=1, stable=True)[:, :room]
    filled = torch.arange(room, device=tokens.device) < kept_counts
    if in_order:
        chosen = chosen.masked_fill(~filled, length).sort(dim=1).values.clamp(max=length - 1)
    result = tokens.new_zeros(batch, context_length)
    result[:, 0] = tokens[:, 0]
    result[:, 1:-1] = tokens.gather(1, chosen).masked_fill(~filled, 0)
    end = tokens.max(dim=1, keepdim=True).values
    return result.scatter_(1, kept_counts + 1, end)
