"""Annotator: what the picture is, whatever the file: an exact hash of its pixels and a perceptual
one.

sha256 of the bytes comes from ingest. `pixel_hash` also finds the same picture in another container
or with other metadata; `phash` finds rescaled and recompressed copies by Hamming distance (selected
on in later steps).
Price: decoding dominates; 0.25 ms for a 64-pixel image.
"""

import hashlib
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.data.images import BadImage, decode

_SIDE = 32  # pixels of the thumbnail, and 8 x 8 low frequencies of it: the usual pHash, 64 bits
_LOW = 8


def dct_basis(size: int, frequencies: int) -> np.ndarray:
    """(frequencies, size) rows of the orthonormal DCT-II."""
    positions = (np.arange(size) + 0.5) * np.pi / size
    basis = np.cos(np.arange(frequencies)[:, None] * positions[None, :]) * np.sqrt(2.0 / size)
    basis[0] /= np.sqrt(2.0)
    return basis


_BASIS = dct_basis(_SIDE, _LOW)


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """64-bit pHash of each grey thumbnail: low DCT coefficients above their median, row by row from
    the highest bit.

    thumbnails: (B, 32, 32) grey values.  Returns (B,) uint64.
    Coefficients are rounded to 1e-3 first: without it the bits of a flat image would be rounding
    noise.
    """
    coefficients = _BASIS @ thumbnails.astype(np.float64) @ _BASIS.T
    low = np.round(coefficients.reshape(len(thumbnails), _LOW * _LOW), 3)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).reshape(-1)


def pixel_hash(image: Image.Image) -> str:
    """32 hex digits of (width, height, RGB values): equal iff the decoded pictures are equal."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


class Hashes:
    """Annotator of `pixel_hash` (hex) and `phash` (uint64); an image that cannot be decoded gets
    nulls and a reason.
    """

    name = "hashes"
    version = 1
    needs_images = True
    reads = ()
    inputs: ClassVar[dict[str, str]] = {}
    columns: ClassVar[dict[str, pa.DataType]] = {
        "pixel_hash": pa.string(),
        "phash": pa.uint64(),
        "hashes_error": pa.string(),
    }

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hash every image; a bad one gets nulls and its reason."""
        rows: list[dict[str, Any]] = []
        thumbnails = []
        for sample in batch:
            row = {"pixel_hash": None, "phash": None, "hashes_error": None}
            rows.append(row)
            try:
                image = decode(sample["image"])
            except BadImage as error:
                row["hashes_error"] = error.reason
                continue
            row["pixel_hash"] = pixel_hash(image)
            thumbnail = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            thumbnails.append((row, np.asarray(thumbnail)))
        if thumbnails:
            hashes = perceptual_hashes(np.stack([grey for _, grey in thumbnails]))
            for (row, _), value in zip(thumbnails, hashes, strict=True):
                row["phash"] = int(value)
        return rows
