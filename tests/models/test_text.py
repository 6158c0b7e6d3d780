import pytest
import torch
from torch import Tensor

from pipeline.models.text import TextTransformer

START, END = 48, 49


def tower(**options: object) -> TextTransformer:
    torch.manual_seed(0)
    model = TextTransformer(
        vocab_size=50, context_length=12, width=16, layers=3, heads=2, **options
    )
    torch.nn.init.normal_(model.position)  # so that a wrong position shows
    return model.double()


def captions(length: int = 12) -> Tensor:
    """Three captions of 2, 5 and 8 words; padding is 0."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.zeros(3, length, dtype=torch.int64)
    for row, words in enumerate((2, 5, 8)):
        tokens[row, 0] = START
        tokens[row, 1 : 1 + words] = torch.randint(1, 48, (words,), generator=generator)
        tokens[row, 1 + words] = END
    return tokens


def test_features_are_those_at_the_end_of_text() -> None:
    model = tower()
    tokens = captions()
    x = model.token_embed(tokens) + model.position
    x = model.ln_final(model.transformer(x))
    expected = torch.stack([x[0, 3], x[1, 6], x[2, 9]])
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_padding_does_not_matter() -> None:
    model = tower()
    tokens = captions()
    other = tokens.clone()
    other[0, 4:] = torch.tensor([7, 3, 9, 1, 1, 2, 40, 5])
    torch.testing.assert_close(model(tokens), model(other), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(tokens), model(tokens[:, :10]), rtol=0, atol=1e-12)


def test_kept_tokens_keep_their_positions() -> None:
    """A caption with dropped words is the short caption at the positions that were kept."""
    model = tower()
    tokens = captions()[2:]
    kept = torch.tensor([[0, 2, 3, 7, 9]])
    x = model.token_embed(tokens[:, kept[0]]) + model.position[kept[0]]
    expected = model.ln_final(model.transformer(x)[:, -1])
    torch.testing.assert_close(model(tokens, kept), expected, rtol=0, atol=1e-12)


def test_keeping_none_is_keeping_all() -> None:
    model = tower()
    everything = torch.arange(12).expand(3, 12)
    expected = model(captions())
    torch.testing.assert_close(model(captions(), everything), expected, rtol=0, atol=1e-12)


def test_initialisation_follows_clip() -> None:
    torch.manual_seed(0)
    model = TextTransformer(vocab_size=500, context_length=64, width=64, layers=1, heads=2)
    assert model.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.position.std().item() == pytest.approx(0.01, rel=0.05)


def test_too_long_captions_say_where_to_look() -> None:
    with pytest.raises(ValueError, match=r"13 positions.*context_length=12"):
        tower()(captions(13))


def test_attributes() -> None:
    model = tower()
    assert (model.width, model.context_length, model.vocab_size) == (16, 12, 50)


def by_hand(model: TextTransformer, row: Tensor) -> Tensor:
    """(n,) ids without padding -> (n, width), every token sees every other or those before it."""
    return model.ln_final(
        model.transformer((model.token_embed(row) + model.position[: len(row)])[None])
    )[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", ["eot", "mean", "first"])
def test_padding_is_as_if_it_were_not_there(pooling: str, causal: bool) -> None:
    model = tower(causal=causal, pooling=pooling, pad_id=0)
    tokens = captions()
    tokens[2, 3] = 0  # a word may have the padding's id
    pick = {"eot": lambda x: x[-1], "mean": lambda x: x.mean(0), "first": lambda x: x[0]}[pooling]
    expected = [
        pick(by_hand(model, row[:length])) for row, length in zip(tokens, (4, 7, 10), strict=True)
    ]
    torch.testing.assert_close(model(tokens), torch.stack(expected), rtol=0, atol=1e-12)


def test_without_a_padding_id_the_whole_row_is_read() -> None:
    tokens = captions()
    for pooling, pick in (("last", lambda x: x[-1]), ("mean", lambda x: x.mean(0))):
        model = tower(causal=False, pooling=pooling)
        expected = torch.stack([pick(by_hand(model, row)) for row in tokens])
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_the_end_of_text_may_have_any_id() -> None:
    model, tokens = tower(eot_id=7), captions()
    tokens[:, 2], tokens[:, 5] = 7, 7
    expected = torch.stack([by_hand(model, row[:3])[-1] for row in tokens])
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_kept_tokens_of_a_bidirectional_tower() -> None:
    model = tower(causal=False, pooling="mean", pad_id=0)
    kept = torch.tensor([[0, 2, 3, 7, 9, 11]])  # the last is padding
    tokens = captions()[2:]
    x = model.token_embed(tokens[:, kept[0, :5]]) + model.position[kept[0, :5]]
    expected = model.ln_final(model.transformer(x)).mean(1)
    torch.testing.assert_close(model(tokens, kept), expected, rtol=0, atol=1e-12)


def test_unknown_pooling_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'cls': one of \['eot', 'first', 'last', 'mean'\]"):
        tower(pooling="cls")
