import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.tokens.attentive import AttentiveTokens, mapped, pooled

PARITY = Path(__file__).parents[1] / "data" / "parity" / "token_masks.json"


def random_maps(batch: int, side: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, side * side, generator=generator, dtype=torch.float64)


def test_equals_aclip() -> None:
    case = json.loads(PARITY.read_text())["aclip_attentive_mask"]
    policy = AttentiveTokens(keep=case["ratio"])
    kept = policy.from_attention(torch.tensor(case["attention"], dtype=torch.float64))
    expected = [[n for n, drop in enumerate(row) if not drop] for row in case["masked"]]
    assert kept.tolist() == expected
    assert kept.shape[1] == policy.num_kept(196) == 100


@pytest.mark.parametrize(("side", "cell"), [(14, 2), (6, 3), (7, 1)])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.8, 0.99])
def test_kept_cells_are_those_with_the_most_attention(side: int, cell: int, keep: float) -> None:
    attention, policy = random_maps(5, side), AttentiveTokens(keep=keep, cell=cell)
    kept = policy.from_attention(attention)
    cells = side // cell
    num_cells = min(cells**2, int(cells**2 * keep) + 1)
    assert kept.shape == (5, policy.num_kept(side * side)) == (5, num_cells * cell**2)
    for row, indices in zip(attention.view(5, side, side), kept, strict=True):
        blocks = {
            (y, x): row[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].sum().item()
            for y in range(cells)
            for x in range(cells)
        }
        best = sorted(blocks, key=blocks.get, reverse=True)[:num_cells]
        expected = sorted(
            (y * cell + dy) * side + x * cell + dx
            for y, x in best
            for dy in range(cell)
            for dx in range(cell)
        )
        assert indices.tolist() == expected


def test_cells_of_equal_attention_stay_in_reading_order() -> None:
    kept = AttentiveTokens(keep=0.3).from_attention(torch.ones(1, 16))
    assert kept.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    kept = AttentiveTokens(keep=0.4999, cell=1).from_attention(torch.ones(1, 6400))
    assert torch.equal(kept, torch.arange(3200).unsqueeze(0))


def test_keeping_everything_drops_nothing() -> None:
    policy = AttentiveTokens(keep=1.0)
    assert policy.from_attention(random_maps(2)) is None
    assert policy.num_kept(196) == 196


def test_pooling_is_half_pixel_bilinear_resizing() -> None:
    attention = random_maps(3)
    resized = F.interpolate(
        attention.view(3, 1, 14, 14), size=(7, 7), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(pooled(attention, 2), resized.flatten(1), rtol=0, atol=1e-15)


def brute_force(attention: Tensor, view: list[int], wide: list[int], side: int) -> Tensor:
    """One map through pixels: resize to the wide box, cut the view's box, resize to the grid."""
    top, left, height, width = view
    pixels = F.interpolate(attention.view(1, 1, side, side), size=wide[2:], mode="bilinear")[0, 0]
    seen = torch.zeros(height, width, dtype=attention.dtype)
    for y in range(height):
        for x in range(width):
            row, column = y + top - wide[0], x + left - wide[1]
            if 0 <= row < wide[2] and 0 <= column < wide[3]:
                seen[y, x] = pixels[row, column]
    return F.interpolate(seen[None, None], size=(side, side), mode="bilinear").flatten()


@pytest.mark.parametrize("side", [1, 4, 14])
def test_mapping_equals_resizing_through_pixels(side: int) -> None:
    generator = torch.Generator().manual_seed(2)
    corners = torch.randint(0, 20, (24, 2, 2), generator=generator)
    sizes = torch.randint(1, 45, (24, 2, 2), generator=generator)
    view, wide = torch.cat([corners, sizes], dim=2).unbind(1)
    attention = random_maps(24, side)
    found = mapped(attention, view, wide)
    for row, one, wide_one, expected in zip(
        attention, view.tolist(), wide.tolist(), found, strict=True
    ):
        brute = brute_force(row, one, wide_one, side)
        torch.testing.assert_close(expected, brute, rtol=0, atol=1e-12)
    assert (found == 0).any()  # some views stick out


def test_the_same_box_at_the_maps_size_changes_nothing() -> None:
    attention, box = random_maps(2), torch.tensor([[3, 5, 14, 14]] * 2)
    torch.testing.assert_close(mapped(attention, box, box), attention, rtol=0, atol=1e-15)


def test_what_the_wide_crop_did_not_see_is_zero() -> None:
    box = torch.tensor([[0, 0, 20, 20]])
    assert not mapped(random_maps(1), box + torch.tensor([20, 0, 0, 0]), box).any()


def test_a_half_of_the_map_is_found_where_it_lies() -> None:
    """Attention in the right half only; the view is the right half."""
    attention = torch.zeros(1, 14, 14)
    attention[:, :, 7:] = 1
    view, wide = torch.tensor([[0, 40, 56, 16]]), torch.tensor([[0, 0, 56, 56]])
    torch.testing.assert_close(mapped(attention.flatten(1), view, wide), torch.ones(1, 196))


def test_what_does_not_fit_says_why() -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
        AttentiveTokens(keep=0)
    with pytest.raises(ValueError, match="cell 0"):
        AttentiveTokens(keep=0.5, cell=0)
    with pytest.raises(ValueError, match="7 x 7 patches does not fall into cells of 2 x 2"):
        AttentiveTokens(keep=0.5).from_attention(random_maps(1, 7))
    with pytest.raises(ValueError, match="10 patches are no square grid"):
        AttentiveTokens(keep=0.5).from_attention(torch.rand(1, 10))
    box = torch.tensor([[0, 0, 4, 4]])
    with pytest.raises(ValueError, match="side of 0 pixels"):
        mapped(random_maps(1), box, box * torch.tensor([1, 1, 0, 1]))
