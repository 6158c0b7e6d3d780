import pytest
import torch
from torch import Tensor

from pipeline.models.clip import CLIP
from pipeline.models.resize import resize_grid, resize_positions, resize_rows
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer


def model(image_size: int, context_length: int, **image: object) -> CLIP:
    torch.manual_seed(0)
    options = {"patch_size": 4, "width": 16, "layers": 1, "heads": 2} | image
    return CLIP(
        image=VisionTransformer(image_size=image_size, **options),
        text=TextTransformer(
            vocab_size=30, context_length=context_length, width=8, layers=1, heads=2
        ),
        embed_dim=6,
    )


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.5, as anti-aliased resizing has it (PIL's bicubic)."""
    x = abs(distance)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def resampling(old: int, new: int) -> Tensor:
    """(new, old): one axis, each new place a weighted mean of old ones, the kernel as wide as the
    coarser of the two grids.
    """
    scale = old / new
    width = max(scale, 1.0)
    rows = []
    for place in range(new):
        centre = (place + 0.5) * scale
        weights = [cubic((source + 0.5 - centre) / width) for source in range(old)]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("old", "new"), [(7, 4), (4, 7), (16, 5), (5, 16)])
def test_a_grid_is_resampled_along_both_axes(old: int, new: int) -> None:
    table = torch.randn(1 + old * old, 3, dtype=torch.float64)
    matrix = resampling(old, new)
    grid = table[1:].view(old, old, 3)
    expected = torch.einsum("ai,bj,ijc->abc", matrix, matrix, grid).view(-1, 3)
    found = resize_grid(table, new * new, prefix=1)
    torch.testing.assert_close(found[1:], expected, rtol=0, atol=1e-12)
    assert torch.equal(found[0], table[0])


def test_the_same_size_is_the_same_table() -> None:
    table = torch.randn(17, 3)
    assert resize_grid(table, 16, prefix=1) is table
    half = torch.randn(17, 3).bfloat16()
    assert resize_grid(half, 25, prefix=1).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="18 rows.*must be square"):
        resize_grid(torch.randn(18, 3), 16, prefix=1)


def test_text_rows_are_cut_repeated_or_stretched() -> None:
    table = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    assert resize_rows(table, 2).flatten().tolist() == [0, 2]
    assert resize_rows(table, 6).flatten().tolist() == [0, 2, 4, 6, 6, 6]
    stretched = resize_rows(table, 8, lengthen="stretch").flatten().tolist()
    assert stretched == [0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6]
    with pytest.raises(ValueError, match=r"'copy': one of \['repeat', 'stretch'\]"):
        resize_rows(table, 6, lengthen="copy")


def test_a_state_dict_of_one_size_becomes_another() -> None:
    small, large = model(16, 6), model(24, 9)
    weights, resized = resize_positions(small.state_dict(), large)
    assert resized == {"image.position": (17, 37), "text.position": (6, 9)}
    large.load_state_dict(weights)
    for name, tensor in small.state_dict().items():
        if name not in resized:
            assert torch.equal(large.state_dict()[name], tensor)
    tokens = torch.tensor([[3, 7, 29, 0, 0, 0]])
    torch.testing.assert_close(large.encode_text(tokens), small.encode_text(tokens))
    weights, resized = resize_positions(small.state_dict(), small)
    assert resized == {}


@pytest.mark.parametrize(
    "image", [{"positions": "sincos"}, {"positions": "none", "rotary_grid": 6}], ids=str
)
def test_fixed_positions_need_no_resizing(image: dict[str, object]) -> None:
    """A table of the other size is the formula's, to the bit: it is no weight."""
    small, large = model(16, 6, **image), model(24, 6, **image)
    weights, resized = resize_positions(small.state_dict(), large)
    assert resized == {}
    large.load_state_dict(weights)
    fresh = model(24, 6, **image)
    fresh.load_state_dict(small.state_dict())
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(large.encode_image(images), fresh.encode_image(images))
