"""Self-attention and cross-attention by torch's fused kernel.

Letters: B samples, N tokens, M tokens looked at, W width, H heads, d = W / H. Parameters are laid
out so that export to open_clip and transformers is a renaming: `qkv` is the fused input projection,
query, key and value stacked in this order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.position import rotate


class QueryValueBias(nn.Linear):
    """The fused projection with biases on query and value alone (BEiT, arXiv:2106.08254; EVA).

    Without rotary positions a key's bias adds the same number to all of a query's scores, which
    softmax forgets. `bias` is (2 W,).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        self.bias = nn.Parameter(torch.zeros(2 * width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, value = self.bias.chunk(2)
        return F.linear(x, self.weight, torch.cat([query, torch.zeros_like(query), value]))


PROJECTIONS = {
    "all": lambda width: nn.Linear(width, 3 * width),
    "query_value": QueryValueBias,
    "none": lambda width: nn.Linear(width, 3 * width, bias=False),
}


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless heads divides width."""
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}: change one of them")


def pick(x: Tensor, at: Tensor) -> Tensor:
    """(B, N, ...) and (B,) -> (B, 1, ...): one token of each row."""
    return x[torch.arange(len(x), device=x.device), at].unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention; causal: token i sees tokens 0..i.

    biases: "all", "query_value" or "none" of the input projection's. norm_query, norm_key: norms
    over d (QK-norm, arXiv:2302.05442, sec. 2). norm_mixed: over W, before the output projection
    (sub-LN, arXiv:2210.06423). None for no norm.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        causal: bool = False,
        biases: str = "all",
        norm_query: nn.Module | None = None,
        norm_key: nn.Module | None = None,
        norm_mixed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        if biases not in PROJECTIONS:
            raise ValueError(f"unknown qkv_bias {biases!r}: one of {sorted(PROJECTIONS)}")
        self.heads = heads
        self.causal = causal
        self.qkv = PROJECTIONS[biases](width)
        self.norm_query = norm_query or nn.Identity()
        self.norm_key = norm_key or nn.Identity()
        self.norm_mixed = norm_mixed or nn.Identity()
        self.out = nn.Linear(width, width)

    def heads_of(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, W) -> query, key, value, each (B, H, N, d), normed and rotated."""
        return self.split(self.qkv(x), rotary)

    def split(
        self, projected: Tensor, rotary: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, from what `qkv` gives."""
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.norm_query(query), self.norm_key(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        return query, key, value

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        seen: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """seen: (B, N) bool, the tokens that may be looked at; None for all.

        at: (B,) int64, the one token of each row that looks, and the answer is (B, 1, W); None for
        all, (B, N, W).
        """
        query, key, value = self.heads_of(x, rotary)
        causal = self.causal
        if at is not None:
            query = pick(query.transpose(1, 2), at).transpose(1, 2)
            if causal:
                before = torch.arange(x.shape[1], device=x.device) <= at[:, None]
                seen, causal = before if seen is None else before & seen, False
        mask = None if seen is None else seen[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(self.norm_mixed(mixed.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Queries look at other tokens: (B, N, W), (B, M, W) -> (B, N, W)."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))
