"""Bytes become the same picture everywhere."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.images import BadImage, ImageTransform, decode


def encoded(image, kind="PNG", **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_alpha_goes_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    pixel = decode(encoded(half)).getpixel((1, 1))
    assert pixel[0] == 255 and abs(pixel[1] - 127) <= 1


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp))))
    assert np.array_equal(pixels[..., 0], (ramp >> 8).astype(np.uint8))


def test_a_palette_with_transparency_goes_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    data = encoded(image, transparency=0)
    assert decode(data).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty_image"), (b"text", "not_an_image")],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_pixels_above_the_limit_are_refused_before_decoding():
    with pytest.raises(BadImage, match="too_many_pixels"):
        decode(encoded(Image.new("RGB", (100, 100))), max_pixels=9_999)


def test_training_crops_are_a_function_of_the_generator(make_picture):
    transform = ImageTransform(image_size=16, crop_scale=(0.3, 1.0), flip=0.5)
    data = make_picture(1, side=50)
    draws = [transform.train(data, np.random.default_rng(n)) for n in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (3, 16, 16) and draws[0].dtype == torch.uint8


@pytest.mark.parametrize("size", [(40, 40), (400, 10), (10, 400), (1, 1)])
def test_crop_boxes_lie_inside_and_have_the_asked_area(size):
    transform = ImageTransform(image_size=8, crop_scale=(0.5, 0.9))
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, upper, right, lower = transform.crop_box(*size, rng)
        assert 0 <= left < right <= size[0] + 1e-9 and 0 <= upper < lower <= size[1] + 1e-9
        if size == (40, 40):
            area = (right - left) * (lower - upper) / 1600
            assert 0.5 - 1e-9 <= area <= 0.9 + 1e-9


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (16, 16), (3, 7)])
def test_evaluation_takes_the_centre(size):
    image = Image.new("RGB", size, "blue")
    out = ImageTransform(image_size=16).evaluate(encoded(image))
    assert out.shape == (3, 16, 16)
    assert (out[2] == 255).all() and (out[0] == 0).all()


def test_normalise_is_zero_mean_unit_variance():
    transform = ImageTransform(image_size=8)
    image = (torch.tensor(transform.mean).view(1, 3, 1, 1) * 255).expand(2, 3, 8, 8)
    assert transform.normalise(image.round().to(torch.uint8)).abs().max() < 0.01
    one = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = (1 - np.array(transform.mean)) / np.array(transform.std)
    np.testing.assert_allclose(transform.normalise(one)[0, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "knobs", [{"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.9, 0.5)}, {"flip": 2}]
)
def test_knobs_out_of_range_are_named(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        ImageTransform(image_size=8, **knobs)
