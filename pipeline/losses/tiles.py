"""Walking a logit matrix tile by tile, so that one tile of it exists at a time.

What is done with a tile is in `torch_tiles` (any device) and `triton_tiles` (CUDA, fused), two
modules with the same functions.
Letters: B rows and columns of a block, D embedding width, R x C one tile.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
# A CPU works in its cache: 4 MiB of float32. A GPU wants a grid that fills it: 64 MiB.
TILE_CPU, TILE_GPU = 1024, 4096


def check_options(*, tile: int | None, backend: str) -> None:
    """Raises ValueError for a tile below 1 or an unknown backend."""
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile} is below 1: set it to rows of a square tile, or to null")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {BACKENDS}")


def in_full(image_embed: Tensor, text_embed: Tensor, *scalars: Tensor) -> list[Tensor]:
    """All of them in what logits are computed in: the wider of the embeddings' types, float32 at
    least.
    """
    dtype = torch.promote_types(image_embed.dtype, text_embed.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return [tensor.to(dtype) for tensor in (image_embed, text_embed, *scalars)]


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Logits in bfloat16 would be half a unit apart at 100."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def choose_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module whose functions compute tiles on this device.

    auto: Triton's on CUDA where Triton is installed, but for float64, which it does not compute.
    Raises ValueError if backend is "triton" and cannot be.
    """
    wanted = backend == "triton" or (backend == "auto" and device.type == "cuda")
    installed = wanted and importlib.util.find_spec("triton") is not None
    fused = None
    if installed and dtype == torch.float32:
        module = importlib.import_module("pipeline.losses.triton_tiles")
        fused = module if module.runs_on(device) else None
    if backend == "triton" and fused is None:
        raise ValueError(
            "backend triton needs Triton installed, tensors on a CUDA device and float32 or "
            f"smaller: got Triton {'installed' if installed else 'missing'}, {device}, {dtype}; "
            "set the loss's backend to auto or torch"
        )
    return fused or importlib.import_module("pipeline.losses.torch_tiles")


def tiles_of(block: Tensor, tile: int | None) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of every tile of a B x B block; the last ones may be smaller.

    block: any tensor with B rows, on the device that will compute.
    """
    size = tile or (TILE_GPU if block.device.type == "cuda" else TILE_CPU)
    starts = range(0, len(block), size)
    slices = [slice(start, min(start + size, len(block))) for start in starts]
    for rows in slices:
        for columns in slices:
            yield rows, columns
