"""A model's weights at another image size or context length: only position tables change.

Letters: P prefix rows (the class token's), N patches = S x S, L text positions, W width.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTHENING = ("repeat", "stretch")


def resize_grid(table: Tensor, num_tokens: int, *, prefix: int) -> Tensor:
    """(P + N, W) -> (P + num_tokens, W): the patches' rows as a picture of W channels, resized
    bicubically with anti-aliasing (as open_clip and DeiT do); prefix rows stay.

    In float32 or better, returned in the table's own type; unchanged, the same tensor, where the
    size is the same.
    Raises ValueError for tables that are no square.
    """
    old, new = (math.isqrt(count) for count in (len(table) - prefix, num_tokens))
    if old**2 + prefix != len(table) or new**2 != num_tokens:
        raise ValueError(
            f"a position table of {len(table)} rows, {prefix} of them for the class token, cannot "
            f"become one of {num_tokens} patches: both grids must be square"
        )
    if old == new:
        return table
    exact = torch.promote_types(table.dtype, torch.float32)
    picture = table[prefix:].to(exact).T.unflatten(1, (old, old)).unsqueeze(0)
    resized = F.interpolate(picture, size=(new, new), mode="bicubic", antialias=True)
    rows = resized.squeeze(0).flatten(1).T.to(table.dtype)
    return torch.cat([table[:prefix], rows])


def resize_rows(table: Tensor, length: int, *, lengthen: str = "repeat") -> Tensor:
    """(L, W) -> (length, W): a text position table.

    A shorter table keeps the first rows: a word's place counts from the start. A longer one keeps
    all rows and repeats the last for places never trained ("repeat"), or has all rows stretched
    linearly over its length ("stretch", as open_clip's loader does, which moves every word).
    """
    if lengthen not in LENGTHENING:
        raise ValueError(f"unknown lengthen {lengthen!r}: one of {sorted(LENGTHENING)}")
    if length <= len(table):
        return table[:length]
    if lengthen == "repeat":
        return torch.cat([table, table[-1:].expand(length - len(table), -1)])
    exact = table.to(torch.promote_types(table.dtype, torch.float32))
    stretched = F.interpolate(exact.T.unsqueeze(0), size=length, mode="linear")
    return stretched.squeeze(0).T.to(table.dtype)


def resize_positions(
    weights: Mapping[str, Tensor], model: nn.Module, *, lengthen: str = "repeat"
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """A CLIP's state_dict, or tensors of the same shapes such as an optimizer's moments, with the
    position tables that `model` has.

    Returns the weights, other tensors untouched, and what was resized: name -> (rows before, rows
    after). Fixed and rotary positions are no weights: the model made its own.
    """
    out, resized = dict(weights), {}
    own = dict(model.named_parameters())
    image, text = "image.position", "text.position"
    if image in weights and image in own:
        out[image] = resize_grid(
            weights[image], model.image.num_tokens, prefix=model.image.num_prefix
        )
    if text in weights and text in own:
        out[text] = resize_rows(weights[text], model.text.context_length, lengthen=lengthen)
    for name in (image, text):
        if name in weights and len(out[name]) != len(weights[name]):
            resized[name] = (len(weights[name]), len(out[name]))
    return out, resized
