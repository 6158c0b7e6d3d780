"""Two random crops of an image and a wide one around both (A-CLIP, arXiv:2212.08653, sec. 3.2).

Letters: B images, S image size.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.data import jpeg
from pipeline.data.images import MAX_PIXELS, BadImage, ImageTransform, decode, to_tensor

Box = tuple[int, int, int, int]  # left, upper, right, lower


class Views(NamedTuple):
    """images: (3, 3, S, S) uint8, two views and the wide crop.  boxes: (3, 4) int64 (top, left,
    height, width) in pixels of the image.
    """

    images: torch.Tensor
    boxes: torch.Tensor


def whole_pixels(box: Sequence[float], width: int, height: int) -> Box:
    """The box with its corners on pixels, at least one pixel wide and high."""
    left, upper = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
    right, lower = max(round(box[2]), left + 1), max(round(box[3]), upper + 1)
    return left, upper, min(right, width), min(lower, height)


def covering(first: Box, second: Box) -> Box:
    """The smallest box around both."""
    return (
        *(min(a, b) for a, b in zip(first[:2], second[:2], strict=True)),
        *(max(a, b) for a, b in zip(first[2:], second[2:], strict=True)),
    )


class ThreeViews(ImageTransform):
    """Image bytes -> two views to train on, and the wide crop whose attention says what of them is
    kept: image_tokens=attentive.

    Nothing is mirrored, so that a map carries over by its box alone; A-CLIP changes nothing but the
    crop either. Everything else, evaluation included: see ImageTransform. crop_scale is A-CLIP's.
    Price: one decoding, three resizings; three times the bytes from loader to device.
    """

    def __init__(
        self,
        *,
        image_size: int,
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        crop_scale: Sequence[float] = (0.5, 1.0),
        crop_ratio: Sequence[float] = (0.75, 1.3333333),
        decode: Literal["exact", "fast", "pil"] = "exact",
    ):
        super().__init__(
            image_size=image_size,
            mean=mean,
            std=std,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            decode=decode,
        )

    def boxes(self, width: int, height: int, rng: np.random.Generator) -> list[Box]:
        """Two random crops on whole pixels, and the box around them."""
        first, second = (
            whole_pixels(self.crop_box(width, height, rng), width, height) for _ in range(2)
        )
        return [first, second, covering(first, second)]

    def train(self, data: bytes, rng: np.random.Generator) -> Views:
        """All randomness comes from `rng`. Raises BadImage."""
        header = jpeg.read_header(data) if self.decode != "pil" else None
        if header is not None:
            if math.prod(header) > MAX_PIXELS:
                raise BadImage("too_many_pixels", f"{header.width}x{header.height} > {MAX_PIXELS}")
            boxes = self.boxes(*header, rng)
            fast = self.decode == "fast"
            found = jpeg.all_cropped(data, header, boxes, self.image_size, fast=fast)
            if found is not None:
                return _views([crop for crop, _ in found], boxes)
        image = decode(data)
        boxes = self.boxes(*image.size, rng)
        size = (self.image_size, self.image_size)
        crops = [image.resize(size, Image.Resampling.BICUBIC, box=box) for box in boxes]
        return _views([to_tensor(crop) for crop in crops], boxes)

    @staticmethod
    def stacked(images: Sequence[Views]) -> dict[str, torch.Tensor]:
        """images: (B, 3, 3, S, S) uint8.  boxes: (B, 3, 4) int64."""
        return {
            "images": torch.stack([views.images for views in images]),
            "boxes": torch.stack([views.boxes for views in images]),
        }


def _views(crops: Sequence[torch.Tensor], boxes: Sequence[Box]) -> Views:
    places = [(upper, left, lower - upper, right - left) for left, upper, right, lower in boxes]
    return Views(torch.stack(tuple(crops)), torch.tensor(places))
