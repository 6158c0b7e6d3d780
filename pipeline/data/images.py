"""Image bytes -> RGB -> a uint8 tensor: decoding, augmentation for training, resizing for
evaluation.

`decode` is the one place where bytes become pixels, so curation and training see the same picture:
alpha goes on
white, CMYK and 16-bit become RGB, an animation gives its first frame. Normalisation happens on the
device.
"""

import functools
import io
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pipeline.data import jpeg

MAX_PIXELS = 50_000_000  # a decompressed RGB image of 150 MB; a bomb is refused from its header
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class BadImage(ValueError):
    """An image that cannot be used; `reason` is a short word for counting."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only. Raises BadImage: empty_image, not_an_image, unsupported_format,
    too_many_pixels.
    """
    if not data:
        raise BadImage("empty_image", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise BadImage("too_many_pixels", str(error)) from error
        except Exception as error:  # PIL's plugins raise anything on foreign bytes
            raise BadImage("not_an_image", str(error)) from error
    if image.format not in FORMATS:
        raise BadImage("unsupported_format", str(image.format))
    if image.width * image.height > max_pixels:
        raise BadImage("too_many_pixels", f"{image.width}x{image.height} > {max_pixels}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the first frame to RGB. Raises BadImage("truncated_image") when the pixels cannot be
    read.
    """
    try:
        image.seek(0)
        image.load()
    except Exception as error:  # truncated or damaged data: each codec has its own exception
        raise BadImage("truncated_image", str(error)) from error
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: PIL's own conversion clips instead of scaling
        grey = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(grey.astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Image bytes -> PIL RGB. Raises BadImage."""
    return to_rgb(open_image(data, max_pixels=max_pixels))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ImageTransform:
    """Image bytes -> (3, image_size, image_size) uint8, and normalisation of a batch.

    train: random resized crop (area fraction in `crop_scale`, aspect ratio in `crop_ratio`),
    bicubic, mirrored with
    probability `flip`. evaluate: shorter side to image_size, bicubic, centre crop (CLIP's
    preprocessing).
    mean, std: per channel, of values in [0, 1]; the defaults are CLIP's.
    decode: how training reads JPEGs; everything else is PIL's, and so is all of evaluation.
        "exact": the whole image by libjpeg-turbo, the crop moved to whole pixels, a bicubic that
        follows PIL's (about 65 dB on the same crop) in about half of PIL's time.
        "fast": decoded at 4/8, 2/8 or 1/8 where the crop allows it; about a third of PIL's time,
        35 dB. "pil": the reference. Numbers: benchmarks/results/loader.md.
    """

    def __init__(
        self,
        *,
        image_size: int,
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        crop_scale: Sequence[float] = (0.9, 1.0),
        crop_ratio: Sequence[float] = (0.75, 1.3333333),
        flip: float = 0.0,
        decode: Literal["exact", "fast", "pil"] = "exact",
    ):
        if decode not in ("exact", "fast", "pil"):
            raise ValueError(f"decode {decode!r}: exact, fast or pil")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {list(crop_scale)}: need 0 < low <= high <= 1")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip {flip}: a probability is in [0, 1]")
        self.image_size, self.decode = image_size, decode
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_scale, self.crop_ratio, self.flip = tuple(crop_scale), tuple(crop_ratio), flip

    def crop_box(self, width: int, height: int, rng: np.random.Generator) -> tuple[float, ...]:
        """(left, upper, right, lower) in pixels of a random crop inside the image."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(*(math.log(value) for value in self.crop_ratio)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, upper = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return left, upper, left + w, upper + h
        side = min(width, height)  # no such crop fits a very long image
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side

    def train(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """(3, S, S) uint8 of a random crop; all randomness comes from `rng`. Raises BadImage."""
        image = self._jpeg(data, rng) if self.decode != "pil" else None
        if image is None:
            image = self._any(data, rng)
        return image.flip(-1) if rng.uniform() < self.flip else image

    @staticmethod
    def stacked(images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `train` gave of each image -> its part of a batch, by name."""
        return {"images": torch.stack(tuple(images))}

    def _jpeg(self, data: bytes, rng: np.random.Generator) -> torch.Tensor | None:
        header = jpeg.read_header(data)
        if header is None:
            return None
        if header.width * header.height > MAX_PIXELS:
            raise BadImage("too_many_pixels", f"{header.width}x{header.height} > {MAX_PIXELS}")
        box = self.crop_box(header.width, header.height, rng)
        found = jpeg.cropped(data, header, box, self.image_size, fast=self.decode == "fast")
        return found and found[0]

    def _any(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        image = decode(data)
        box = self.crop_box(image.width, image.height, rng)
        size = (self.image_size, self.image_size)
        return to_tensor(image.resize(size, Image.Resampling.BICUBIC, box=box))

    def evaluate(self, data: bytes) -> torch.Tensor:
        """(3, S, S) uint8: shorter side to S, centre crop. Raises BadImage."""
        image = decode(data)
        # the longer side as transformers rounds it, so that exported models see the same pixels
        size = [int(self.image_size * side / min(image.size)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, upper = ((side - self.image_size) // 2 for side in image.size)
        return to_tensor(image.crop((left, upper, left + self.image_size, upper + self.image_size)))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) uint8 in [0, 255] -> float32, zero mean and unit variance per channel."""
        mean, std = (_of_levels(tuple(x), images.device) for x in (self.mean, self.std))
        return (images.float() - mean) / std


@functools.lru_cache(maxsize=16)
def _of_levels(channels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(3, 1, 1), kept on the device: sending it there in each micro-batch would wait for it."""
    return torch.tensor(channels, device=device).view(3, 1, 1) * 255
