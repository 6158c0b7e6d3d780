import io
import pickle

import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from curation.annotate.text_spotting import TextSpotting


def drawing(word, side=64, letters=18):
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((2, 2, side - 3, side - 3), side // 6, fill=(30, 90, 200))
    font = ImageFont.load_default(letters)
    draw.text((side / 2, side / 2), word, font=font, fill="white", anchor="mm")
    return image


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def spotting():
    return TextSpotting()


def texts(row):
    return [region["text"] for region in row["spotted_text"]]


def test_reads_rendered_words_at_64_pixels(spotting):
    words = ["SOS", "NEW", "OK", "TAXI", "OPEN"]
    batch = [{"uid": word, "image": encoded(drawing(word))} for word in words]
    rows = spotting.annotate(batch)
    assert [texts(row) for row in rows] == [[word] for word in words]
    region = rows[0]["spotted_text"][0]
    assert 0.5 <= region["confidence"] <= 1.0
    assert 0.1 < region["area_fraction"] < 0.7
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(TextSpotting.columns.items())))
    assert table.num_rows == 5


def test_small_images_are_enlarged(spotting):
    batch = [{"uid": w, "image": encoded(drawing(w, 32, 10))} for w in ("EXIT", "BACK", "POLICE")]
    enlarged = sum(texts(row) != [] for row in spotting.annotate(batch))
    assert enlarged == 3
    assert spotting.scaled(Image.new("RGB", (64, 64), "red"))[0, 0].tolist() == [0, 0, 255]  # BGR
    assert spotting.scaled(Image.new("RGB", (32, 40))).shape == (80, 64, 3)
    assert spotting.scaled(Image.new("RGB", (64, 64))).shape == (64, 64, 3)
    assert spotting.scaled(Image.new("RGB", (1920, 480))).shape == (240, 960, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3), (33, 7)])
def test_odd_sizes_do_not_stop_the_engine(spotting, size):
    assert min(spotting.scaled(Image.new("RGB", size)).shape[:2]) >= 32
    row = spotting.annotate([{"uid": "x", "image": encoded(Image.new("RGB", size, "white"))}])[0]
    assert row == {"spotted_text": [], "text_spotting_error": None}


def test_a_bad_image_and_an_engine_failure_are_counted(spotting, monkeypatch):
    good = encoded(drawing("OK"))

    def fails(pixels, use_cls):
        raise RuntimeError("out of cheese")

    assert spotting.annotate([{"uid": "a", "image": b"no image"}])[0] == {
        "spotted_text": [],
        "text_spotting_error": "not_an_image",
    }
    broken = TextSpotting()
    broken.build()
    monkeypatch.setattr(broken, "_engine", fails)
    rows = broken.annotate([{"uid": "a", "image": good}, {"uid": "b", "image": good}])
    assert [row["text_spotting_error"] for row in rows] == ["engine_RuntimeError"] * 2


def test_an_engine_that_cannot_be_built_stops_the_run(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError):
        TextSpotting().annotate([{"uid": "a", "image": encoded(drawing("OK"))}])


def test_the_engine_does_not_travel(spotting):
    spotting.build()
    copy = pickle.loads(pickle.dumps(spotting))
    assert copy._engine is None
    assert copy.min_side == spotting.min_side


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"min_side": 0}, "min_side 0"),
        ({"min_side": 100, "max_side": 50}, "max_side 50"),
        ({"min_confidence": 1.5}, "min_confidence 1.5"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        TextSpotting(**knobs)
