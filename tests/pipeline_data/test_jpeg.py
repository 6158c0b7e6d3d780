"""JPEG crops: as PIL makes them, and PIL's verdict on whatever is odd."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import images, jpeg
from pipeline.data.images import BadImage, ImageTransform


def photograph(number, width=500, height=375):
    """Pixels with the statistics of photographs: amplitude falls with frequency, and edges."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / (frequency + 0.01) ** 1.4
    noise = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 128 + 40 * (noise[:1] + 0.4 * noise) / noise.std()
    for _ in range(6):
        x, y, side = rng.integers(0, width), rng.integers(0, height), rng.integers(10, 90)
        pixels[:, y : y + side, x : x + side] += rng.uniform(-60, 60, (3, 1, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image, **options):
    sink = io.BytesIO()
    image.save(sink, "JPEG", **{"quality": 85, **options})
    return sink.getvalue()


def psnr(ours, image, box, size):
    wanted = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    error = (ours.permute(1, 2, 0).numpy().astype(float) - wanted) ** 2
    return 10 * np.log10(255**2 / error.mean())


@pytest.mark.parametrize("colours", ["RGB", "L"])
@pytest.mark.parametrize(("fast", "decibels"), [(False, 48), (True, 27)])
@pytest.mark.parametrize("size", [224, 112, 64])
def test_a_crop_is_close_to_pil(size, fast, decibels, colours):
    transform = ImageTransform(image_size=size, crop_scale=(0.3, 1.0))
    for number in range(4):
        data = encoded(photograph(number).convert(colours), subsampling=number % 3)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        header = jpeg.read_header(data)
        box = transform.crop_box(*header, np.random.default_rng(number))
        crop, taken = jpeg.cropped(data, header, box, size, fast=fast)
        assert crop.shape == (3, size, size) and crop.dtype == torch.uint8
        assert psnr(crop, image, taken, size) > decibels
        grid = 8 / jpeg.eighths(box, size) if fast else 1
        whole, _ = jpeg.cropped(data, header, box, size, fast=False)
        assert torch.equal(crop, whole) == (grid == 1)
        for axis, shift in ((0, 3), (0, -3), (1, 3), (1, -3)):  # it lies where it says
            moved = [side + shift * (k % 2 == axis) for k, side in enumerate(taken)]
            if min(moved) >= 0 and moved[2] <= 500 and moved[3] <= 375:
                assert psnr(crop, image, moved, size) < psnr(crop, image, taken, size) - 1
        assert max(abs(a - b) for a, b in zip(box, taken, strict=True)) <= grid / 2 + 1e-6


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((0, 0, 500, 375), 224, 4),  # 188 pixels high, stretched by 1.19
        ((0, 0, 500, 330), 224, 8),  # 165 would be stretched by 1.36
        ((10, 10, 490, 370), 112, 2),
        ((0, 0, 200, 200), 224, 8),  # never more pixels than there are
        ((0, 0, 4000, 3000), 224, 1),
    ],
)
def test_the_scale_comes_from_the_crop(box, size, expected):
    assert jpeg.eighths(box, size) == expected


def test_a_small_crop_of_a_large_image_is_not_read_from_a_thumbnail():
    """What the whole image would allow, 1/8, would lose all detail of this crop."""
    image = photograph(0, 1000, 750)
    data = encoded(image, quality=95)
    box = (400, 300, 500, 400)
    crop, taken = jpeg.cropped(data, jpeg.read_header(data), box, 96, fast=True)
    assert taken == box and psnr(crop, image, box, 96) > 35


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_whatever_is_no_plain_jpeg_is_read_as_pil_reads_it(mode, make_picture):
    ours, pil = (ImageTransform(image_size=16, flip=0.5, decode=m) for m in (mode, "pil"))
    odd = [
        make_picture(1, side=40),
        make_picture(2, "WEBP", side=40),
        encoded(photograph(1, 60, 40).convert("CMYK")),
    ]
    for data in odd:
        made = [t.train(data, np.random.default_rng(0)) for t in (ours, pil)]
        assert torch.equal(*made)


@pytest.mark.parametrize("mode", ["exact", "fast", "pil"])
def test_a_truncated_jpeg_is_refused_and_junk_behind_it_is_not(mode):
    transform = ImageTransform(image_size=16, decode=mode)
    data = encoded(photograph(1, 200, 150))
    with pytest.raises(BadImage) as caught:
        transform.train(data[: len(data) // 2], np.random.default_rng(0))
    assert caught.value.reason == "truncated_image"
    for cut in (1, 3, 20):  # the header itself is cut
        with pytest.raises(BadImage):
            transform.train(data[:cut], np.random.default_rng(0))
    transform.train(data + b"junk" * 20, np.random.default_rng(0))


@pytest.mark.parametrize("mode", ["exact", "fast", "pil"])
def test_a_jpeg_bomb_is_refused_from_its_header(mode, monkeypatch):
    data = encoded(Image.new("RGB", (64, 64)))
    start = data.index(b"\xff\xc0") + 5
    data = data[:start] + (60_000).to_bytes(2, "big") * 2 + data[start + 4 :]

    def read(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(jpeg, "cropped", read)
    monkeypatch.setattr(images, "to_rgb", read)
    with pytest.raises(BadImage, match="too_many_pixels"):
        ImageTransform(image_size=16, decode=mode).train(data, np.random.default_rng(0))


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_crops_are_a_function_of_the_generator(mode):
    transform = ImageTransform(image_size=48, crop_scale=(0.3, 1.0), flip=0.5, decode=mode)
    data = encoded(photograph(3))
    draws = [transform.train(data, np.random.default_rng(n)) for n in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    mirrored = ImageTransform(image_size=48, crop_scale=(0.3, 1.0), flip=1.0, decode=mode)
    straight = ImageTransform(image_size=48, crop_scale=(0.3, 1.0), flip=0.0, decode=mode)
    pair = [t.train(data, np.random.default_rng(5)) for t in (mirrored, straight)]
    assert torch.equal(pair[0].flip(-1), pair[1])


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (17, 9)])
def test_tiny_and_long_images_work(size):
    for mode in ("exact", "fast"):
        transform = ImageTransform(image_size=32, decode=mode)
        out = transform.train(encoded(Image.new("RGB", size, "blue")), np.random.default_rng(0))
        assert out.shape == (3, 32, 32) and out[2].min() > 240 and out[0].max() < 10


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="decode 'quick': exact, fast or pil"):
        ImageTransform(image_size=8, decode="quick")
