"""Two crops and the wide one around them: pictures and boxes belong together."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.images import BadImage
from pipeline.data.stream import ShardStream
from pipeline.data.three_views import ThreeViews, covering, whole_pixels
from pipeline.shards import Record, content_uid, write_manifest, write_shard

SIZE, WIDTH, HEIGHT = 16, 60, 40


def picture(kind: str) -> bytes:
    """A ramp in x (red) and y (green): a crop's pixels tell where it was cut."""
    x, y = np.meshgrid(np.linspace(0, 240, WIDTH), np.linspace(0, 240, HEIGHT))
    pixels = np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **({"quality": 98} if kind == "JPEG" else {}))
    return sink.getvalue()


@pytest.mark.parametrize(("kind", "decode"), [("JPEG", "exact"), ("JPEG", "pil"), ("PNG", "exact")])
def test_a_view_is_what_lies_in_its_box(kind: str, decode: str) -> None:
    transform, data = ThreeViews(image_size=SIZE, decode=decode), picture(kind)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(5):
        views = transform.train(data, np.random.default_rng(seed))
        assert views.images.shape == (3, 3, SIZE, SIZE) and views.images.dtype == torch.uint8
        assert views.boxes.shape == (3, 4) and views.boxes.dtype == torch.int64
        for crop, (top, left, height, width) in zip(
            views.images, views.boxes.tolist(), strict=True
        ):
            box = (left, top, left + width, top + height)
            expected = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
            expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
            assert (crop.int() - expected.int()).abs().max() <= 2


def test_the_wide_crop_is_the_smallest_around_both() -> None:
    transform = ThreeViews(image_size=SIZE)
    for seed in range(50):
        first, second, wide = transform.boxes(WIDTH, HEIGHT, np.random.default_rng(seed))
        pairs = list(zip(first, second, wide, strict=True))
        assert all(w == min(a, b) for a, b, w in pairs[:2])
        assert all(w == max(a, b) for a, b, w in pairs[2:])
        for left, upper, right, lower in (first, second, wide):
            assert 0 <= left < right <= WIDTH and 0 <= upper < lower <= HEIGHT
        area = (first[2] - first[0]) * (first[3] - first[1]) / (WIDTH * HEIGHT)
        assert 0.45 < area <= 1
    assert first != second


def test_boxes_of_small_images_keep_a_pixel() -> None:
    assert whole_pixels((0.4, 0.6, 0.45, 0.7), 1, 1) == (0, 0, 1, 1)
    assert whole_pixels((2.4, 2.6, 2.45, 3.0), 3, 3) == (2, 2, 3, 3)
    assert covering((0, 1, 2, 2), (1, 0, 3, 2)) == (0, 0, 3, 2)


def test_views_are_a_function_of_the_generator() -> None:
    transform, data = ThreeViews(image_size=SIZE), picture("JPEG")
    draws = [transform.train(data, np.random.default_rng(n)) for n in (0, 0, 1)]
    assert torch.equal(draws[0].images, draws[1].images)
    assert torch.equal(draws[0].boxes, draws[1].boxes)
    assert not torch.equal(draws[0].boxes, draws[2].boxes)


def test_what_cannot_be_read_has_a_reason() -> None:
    with pytest.raises(BadImage, match="not_an_image"):
        ThreeViews(image_size=SIZE).train(b"text", np.random.default_rng(0))
    damaged = picture("JPEG")[:200]
    with pytest.raises(BadImage):
        ThreeViews(image_size=SIZE).train(damaged, np.random.default_rng(0))


def test_the_stream_carries_boxes(tmp_path, make_picture) -> None:
    made = []
    for number in range(8):
        image, caption = make_picture(number), f"caption {number}"
        uid = content_uid(image, caption)
        made.append(Record(uid, image, "png", caption, {"uid": uid}))
    entry = write_shard(tmp_path, "shard-000000", made)
    step = {"name": "ingest", "read": 8, "kept": 8, "dropped": {}}
    write_manifest(tmp_path, {"num_samples": 8, "shards": [entry], "steps": [step]})
    transform = ThreeViews(image_size=SIZE)

    def batch(**place: int) -> dict:
        stream = ShardStream(
            shards=str(tmp_path),
            transform=transform,
            tokenizer=lambda captions: torch.zeros(len(captions), 1, dtype=torch.int64),
            global_batch_size=4,
            **place,
        )
        return next(iter(stream))

    whole = batch()
    assert whole["images"].shape == (4, 3, 3, SIZE, SIZE) and whole["boxes"].shape == (4, 3, 4)
    halves = [batch(rank=rank, world_size=2) for rank in range(2)]
    for name in ("images", "boxes"):
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])
    normal = transform.normalise(whole["images"])
    assert torch.equal(normal[:, 1], transform.normalise(whole["images"][:, 1]))
