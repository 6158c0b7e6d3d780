import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from curation.annotate.hashes import Hashes, dct_basis, perceptual_hashes


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    image = Image.new("RGB", (96, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 50, 50), fill="red")
    draw.rectangle((60, 20, 90, 60), fill="navy")
    return image


def annotate(*images):
    return Hashes().annotate([{"uid": str(i), "image": data} for i, data in enumerate(images)])


def bits_apart(a, b):
    return (a ^ b).bit_count()


def slow_phash(grey):
    """The definition: DCT-II by its sum, 8 x 8 lowest frequencies against their median."""
    low = np.zeros((8, 8))
    for u in range(8):
        for v in range(8):
            scale = (math.sqrt(0.5) if u == 0 else 1) * (math.sqrt(0.5) if v == 0 else 1) / 16
            x, y = np.arange(32)[:, None], np.arange(32)[None, :]
            waves = np.cos(np.pi * (x + 0.5) * u / 32) * np.cos(np.pi * (y + 0.5) * v / 32)
            low[u, v] = scale * (grey * waves).sum()
    low = np.round(low, 3).ravel()
    return sum(int(bit) << (63 - i) for i, bit in enumerate(low > np.median(low)))


def test_phash_is_the_definition():
    grey = np.random.default_rng(0).integers(0, 256, (5, 32, 32))
    assert [int(h) for h in perceptual_hashes(grey)] == [slow_phash(g) for g in grey]


def test_dct_is_orthonormal():
    basis = dct_basis(32, 8)
    assert np.abs(basis @ basis.T - np.eye(8)).max() < 1e-12


def test_same_pixels_in_another_container(picture):
    png, webp, other = annotate(
        encoded(picture, format="PNG"),
        encoded(picture, format="WEBP", lossless=True),
        encoded(picture.rotate(90, expand=True), format="PNG"),
    )
    assert png == webp
    assert png["pixel_hash"] != other["pixel_hash"]
    assert len(png["pixel_hash"]) == 32


def test_size_is_part_of_the_pixel_hash():
    wide, high = (encoded(Image.new("RGB", size), format="PNG") for size in ((4, 9), (9, 4)))
    assert len({row["pixel_hash"] for row in annotate(wide, high)}) == 2


def test_phash_of_copies_is_near_and_of_others_far(picture):
    exact, small, lossy, other = annotate(
        encoded(picture, format="PNG"),
        encoded(picture.resize((48, 32)), format="PNG"),
        encoded(picture, format="JPEG", quality=60),
        encoded(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), format="PNG"),
    )
    assert bits_apart(exact["phash"], small["phash"]) <= 6
    assert bits_apart(exact["phash"], lossy["phash"]) <= 6
    assert bits_apart(exact["phash"], other["phash"]) > 15


def test_flat_images_have_no_noise_bits():
    rows = annotate(
        *(encoded(Image.new("RGB", (40, 40), c), format="PNG") for c in ("white", "teal"))
    )
    assert rows[0]["phash"] == rows[1]["phash"] == 1 << 63
    assert rows[0]["pixel_hash"] != rows[1]["pixel_hash"]


def test_a_bad_image_is_counted_and_the_rest_goes_on(picture):
    good = encoded(picture, format="PNG")
    rows = annotate(b"", good, good[:60], good)
    assert rows[1] == rows[3]
    assert rows[1]["hashes_error"] is None
    assert [rows[i]["hashes_error"] for i in (0, 2)] == ["empty_image", "truncated_image"]
    assert rows[0]["pixel_hash"] is None
    assert rows[0]["phash"] is None


def test_rows_are_the_columns(picture):
    assert set(annotate(encoded(picture, format="PNG"))[0]) == set(Hashes.columns)
