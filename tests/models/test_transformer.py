import math

import pytest
import torch

from pipeline.models.attention import Attention
from pipeline.models.mlp import QuickGelu
from pipeline.models.transformer import Transformer


def attention_by_hand(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """One head at a time, softmax written out."""
    width = x.shape[-1]
    size = width // layer.heads
    query, key, value = layer.qkv(x).split(width, dim=-1)
    heads = []
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].mT / math.sqrt(size)
        if layer.causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        heads.append(scores.softmax(-1) @ value[..., part])
    return layer.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_softmax_written_out(causal: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(width=12, heads=3, causal=causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), attention_by_hand(layer, x), rtol=0, atol=1e-12)


def test_causal_attention_does_not_see_later_tokens() -> None:
    torch.manual_seed(0)
    model = Transformer(width=8, layers=2, heads=2, causal=True)
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(model(x)[:, :4], model(changed)[:, :4])
    assert not torch.allclose(model(x)[:, 4:], model(changed)[:, 4:])


def test_initialisation_follows_clip() -> None:
    torch.manual_seed(0)
    width, layers = 256, 8
    block = Transformer(width=width, layers=layers, heads=4).blocks[-1]
    expected = {
        block.attention.qkv: width**-0.5,
        block.attention.out: width**-0.5 / math.sqrt(2 * layers),
        block.mlp.up: (2 * width) ** -0.5,
        block.mlp.down: width**-0.5 / math.sqrt(2 * layers),
    }
    for linear, std in expected.items():
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not linear.bias.any()
    assert block.norm_1.eps == 1e-5


def test_quick_gelu() -> None:
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(QuickGelu()(x), x / (1 + torch.exp(-1.702 * x)))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 3"):
        Transformer(width=10, layers=1, heads=3)
    with pytest.raises(ValueError, match=r"'relu'.*gelu.*quick_gelu"):
        Transformer(width=8, layers=1, heads=2, activation="relu")
