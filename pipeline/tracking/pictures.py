"""Sheets of pictures for a person: what a batch retrieves, confuses, and is shown of its images.

Letters: B pairs, N patches, K kept patches, H and W pixels.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

RIGHT, WRONG = "#1b7f4b", "#b3541e"


def retrieval_sheet(
    images: Tensor, captions: Sequence[str], similarity: Tensor, *, rows: int = 6, best: int = 4
) -> Figure:
    """The first images of a batch, and the captions nearest to each; its own in green.

    images: (B, 3, H, W) uint8.  similarity: (B, B), images by captions.
    """
    figure, axes = _axes(min(rows, len(images)), 2, widths=(1, 4))
    for row, (left, right) in enumerate(axes):
        _show(left, images[row])
        order = similarity[row].argsort(descending=True, stable=True)
        place = int((order == row).nonzero()[0])
        lines = [(int(n), f"{similarity[row, n]:.2f}  {captions[n]}") for n in order[:best]]
        if place >= best:
            lines.append((row, f"{similarity[row, row]:.2f}  {captions[row]}  (place {place + 1})"))
        for line, (number, text) in enumerate(lines):
            own = number == row or captions[number] == captions[row]
            _line(right, line, text, RIGHT if own else WRONG)
    return figure


def negatives_sheet(
    images: Tensor, captions: Sequence[str], similarity: Tensor, *, rows: int = 6
) -> Figure:
    """The nearest pairs that are not one: wrong captions, or right ones taken for wrong.

    One row an image: it, its own caption, the other's caption, the other's image. Pairs with the
    same caption are left out.
    """
    wrong = similarity.clone().fill_diagonal_(-torch.inf)
    known: dict[str, int] = {}
    group = torch.tensor([known.setdefault(caption, len(known)) for caption in captions])
    wrong[group[:, None] == group] = -torch.inf
    nearest, other = wrong.max(dim=1)
    order = nearest.argsort(descending=True, stable=True)
    order = order[nearest[order].isfinite()][:rows]
    figure, axes = _axes(max(len(order), 1), 3, widths=(1, 3, 1))
    for (left, middle, right), row in zip(axes, order.tolist(), strict=False):
        there = int(other[row])
        _show(left, images[row])
        _show(right, images[there])
        _line(middle, 0, f"{similarity[row, row]:.2f}  {captions[row]}", RIGHT)
        _line(middle, 1, f"{similarity[row, there]:.2f}  {captions[there]}", WRONG)
    return figure


def kept_patches_sheet(images: Sequence[Tensor], *, columns: int = 8, rows: int = 2) -> Figure:
    """The first images of `seen_only`."""
    shown = images[: columns * rows]
    figure, axes = _axes(-(-len(shown) // columns), columns, widths=(1,) * columns, height=1.4)
    for axis, image in zip(axes.ravel(), shown, strict=False):
        _show(axis, image)
    return figure


def seen_only(image: Tensor, kept: Tensor, num_patches: int) -> Tensor:
    """(3, H, W) uint8 with the patches that are not `kept` (K,) paled to a fifth."""
    side = round(num_patches**0.5)
    grid = torch.zeros(num_patches).index_fill_(0, kept.cpu(), 1.0).view(1, 1, side, side)
    mask = torch.nn.functional.interpolate(grid, image.shape[1:], mode="nearest")[0]
    share = 0.2 + 0.8 * mask
    return (image * share + 255 * (1 - share)).round().to(torch.uint8)


def _axes(
    rows: int, columns: int, *, widths: Sequence[int], height: float = 1.25
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(10, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": widths})
    for axis in axes.ravel():
        axis.axis("off")
    return figure, axes


def _show(axis: Axes, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")


def _line(axis: Axes, number: int, text: str, color: str) -> None:
    text = textwrap.shorten(text.replace("$", r"\$"), 110, placeholder=" ...")
    axis.text(0, 0.85 - 0.2 * number, text, color=color, fontsize=8, va="top")
