import math

import pytest
import torch

from pipeline.models.attention import Attention
from pipeline.models.mlp import QuickGelu, make_mlp
from pipeline.models.transformer import BlockStyle, Transformer


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
    with pytest.raises(ValueError, match=r"'relu'.*gelu.*quick_gelu.*swiglu"):
        Transformer(width=8, layers=1, heads=2, activation="relu")
    for option, message in (
        ({"norm": "batch"}, r"norm 'batch': one of \['layer', 'rms'\]"),
        ({"qkv_bias": "key"}, r"qkv_bias 'key': one of \['all', 'none', 'query_value'\]"),
        ({"norm_place": "around"}, r"norm_place 'around': one of \['after', 'before'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Transformer(width=8, layers=1, heads=2, block=BlockStyle(**option))


def test_rms_norm_is_its_formula() -> None:
    norm = BlockStyle(norm="rms", norm_eps=1e-3).make_norm(6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_a_gate_is_silu_of_one_layer_times_the_other() -> None:
    mlp = make_mlp(width=6, hidden=10, activation="swiglu", norm=torch.nn.LayerNorm(10))
    x = torch.randn(4, 6)
    gate = mlp.gate(x)
    expected = mlp.down(mlp.norm(gate * torch.sigmoid(gate) * mlp.up(x)))
    torch.testing.assert_close(mlp(x), expected)


def test_no_key_bias_is_a_key_bias_of_zero() -> None:
    torch.manual_seed(0)
    half = Attention(width=8, heads=2, biases="query_value")
    torch.nn.init.normal_(half.qkv.bias)
    whole = Attention(width=8, heads=2)
    whole.load_state_dict(half.state_dict() | {"qkv.bias": torch.zeros(24)})
    with torch.no_grad():
        whole.qkv.bias[:8], whole.qkv.bias[16:] = half.qkv.bias.chunk(2)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(half(x), whole(x))
    assert sum(p.numel() for p in half.qkv.parameters()) == 8 * 24 + 16


def test_hidden_tokens_are_not_looked_at() -> None:
    torch.manual_seed(0)
    layer = Attention(width=8, heads=2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    seen = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = layer(x[:1, seen[0]])
    torch.testing.assert_close(layer(x, seen=seen)[:1, seen[0]], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, seen=seen)[1:], layer(x[1:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["before", "after"])
@pytest.mark.parametrize("causal", [False, True])
def test_one_token_is_what_it_is_among_all(causal: bool, style: str) -> None:
    """Value and gradient, though the last block computes no other."""
    torch.manual_seed(0)
    block = BlockStyle(norm_place=style)
    model = Transformer(width=8, layers=3, heads=2, causal=causal, block=block).double()
    x = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([0, 5, 2, 2])
    seen = torch.ones(4, 6, dtype=torch.bool)
    seen[2, 1] = False
    visible = None if causal else seen
    one, whole = model(x, seen=visible, at=at), model(x, seen=visible)[torch.arange(4), at]
    torch.testing.assert_close(one[:, 0], whole, rtol=0, atol=1e-12)
    weights = torch.randn(4, 8, dtype=torch.float64)
    inputs = [x, *model.parameters()]
    ours, theirs = (
        torch.autograd.grad((out * weights).sum(), inputs) for out in (one[:, 0], whole)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
