import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

from curation.annotate.rapidocr import RapidOcr
from curation.annotate.text_spotter import EngineUnavailable, Region
from curation.annotate.text_spotting import TextSpotting, covered_fraction
from pipeline.check import composed
from pipeline.config import CONF, build, problems


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


def samples(*images):
    return [{"uid": str(i), "image": encoded(image)} for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def spotting():
    return TextSpotting()


def texts(row):
    return [region["text"] for region in row["spotted_text"]]


def overlap(a, b):
    """Intersection over union of two (x0, y0, x1, y1)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (area - shared)


class Scripted:
    """An engine that finds what it is told to: the interface for other engines."""

    def __init__(self, *, regions=(), crash_on=()):
        self.regions, self.crash_on = list(regions), set(crash_on)
        self.seen = []

    def spot(self, image):
        self.seen.append(image)
        if len(self.seen) - 1 in self.crash_on:
            raise RuntimeError("out of cheese")
        return self.regions


def test_reads_rendered_words_at_64_pixels(spotting):
    words = ["SOS", "NEW", "OK", "TAXI", "OPEN"]
    rows = spotting.annotate(samples(*map(drawing, words)))
    assert [texts(row) for row in rows] == [[word] for word in words]
    region = rows[0]["spotted_text"][0]
    assert 0.5 <= region["confidence"] <= 1.0
    assert 0.1 < region["area_fraction"] < 0.7
    assert rows[0]["text_area_fraction"] == pytest.approx(region["area_fraction"], abs=0.01)
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(TextSpotting.columns.items())))
    assert table.num_rows == 5


@pytest.mark.parametrize("size", [(160, 96), (400, 120)])
def test_words_are_found_where_they_are(spotting, size):
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    places = {"NO": (10, 10), "SMOKING": (48, 10), "Exit": (20, 60)}
    for word, place in places.items():
        draw.text(place, word, font=font, fill="black")
    row = spotting.annotate(samples(image))[0]
    assert texts(row) == list(places)
    for region, (word, place) in zip(row["spotted_text"], places.items(), strict=True):
        left, top, right, bottom = draw.textbbox(place, word, font=font)
        drawn = (left / size[0], top / size[1], right / size[0], bottom / size[1])
        found = tuple(region[side] for side in ("x0", "y0", "x1", "y1"))
        assert all(0.0 <= side <= 1.0 for side in found)
        assert overlap(found, drawn) > 0.4, (word, found, drawn)
    assert row["text_area_fraction"] == pytest.approx(
        sum(region["area_fraction"] for region in row["spotted_text"]), abs=0.01
    )


def test_the_box_of_a_padded_image_is_in_the_image():
    image = Image.new("RGB", (60, 20), "white")
    ImageDraw.Draw(image).text((25, 2), "OK", font=ImageFont.load_default(14), fill="black")
    row = TextSpotting(min_side=20).annotate(samples(image))[0]
    assert texts(row) == ["OK"]
    region = row["spotted_text"][0]
    box = tuple(region[side] for side in ("x0", "y0", "x1", "y1"))
    assert overlap(box, (25 / 60, 0.2, 45 / 60, 0.8)) > 0.4


def test_small_images_are_enlarged_and_large_ones_reduced(spotting):
    words = ("EXIT", "BACK", "POLICE")
    rows = spotting.annotate(samples(*(drawing(word, 32, 10) for word in words)))
    assert sum(texts(row) != [] for row in rows) == 3
    assert spotting.scaled(Image.new("RGB", (64, 64), "red"))[0, 0].tolist() == [255, 0, 0]
    assert spotting.scaled(Image.new("RGB", (32, 40))).shape == (80, 64, 3)
    assert spotting.scaled(Image.new("RGB", (64, 64))).shape == (64, 64, 3)
    assert spotting.scaled(Image.new("RGB", (1920, 480))).shape == (240, 960, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3), (33, 7)])
def test_odd_sizes_do_not_stop_the_engine(spotting, size):
    row = spotting.annotate(samples(Image.new("RGB", size, "white")))[0]
    assert row == {"spotted_text": [], "text_area_fraction": 0.0, "text_spotting_error": None}


def test_rapidocr_is_given_blue_green_red_of_32_pixels_at_least():
    seen = []

    def record(pixels, **options):
        seen.append(pixels)
        return None, None

    engine = RapidOcr()
    engine._engine = record
    image = np.arange(5 * 40 * 3, dtype=np.uint8).reshape(5, 40, 3)
    assert engine.spot(image) == []
    assert seen[0].shape == (32, 40, 3)
    np.testing.assert_array_equal(seen[0][13:18], image[:, :, ::-1])
    np.testing.assert_array_equal(seen[0][0], image[0, :, ::-1])  # edges are repeated
    np.testing.assert_array_equal(seen[0][31], image[-1, :, ::-1])


def test_another_engine_is_chosen_by_its_class_and_its_polygons_are_normalised():
    square = ((-8.0, 0.0), (32.0, 0.0), (32.0, 32.0), (-8.0, 32.0))
    triangle = ((0.0, 0.0), (64.0, 0.0), (0.0, 128.0))
    engine = Scripted(
        regions=[Region("a", 0.9, square), Region("b", 0.5, triangle), Region("c", 0.4, square)]
    )
    row = TextSpotting(engine=engine).annotate(samples(Image.new("RGB", (64, 128), "red")))[0]
    assert engine.seen[0].shape == (128, 64, 3)
    assert engine.seen[0][0, 0].tolist() == [255, 0, 0]
    first, second = row["spotted_text"]  # "c" is below min_confidence
    assert (first["text"], second["text"]) == ("a", "b")
    assert [first[k] for k in ("x0", "y0", "x1", "y1")] == [0.0, 0.0, 0.5, 0.25]
    assert first["area_fraction"] == 0.125
    assert [second[k] for k in ("x0", "y0", "x1", "y1")] == [0.0, 0.0, 1.0, 1.0]
    assert second["area_fraction"] == 0.5
    # the square, cut at the image's edge, lies inside the triangle x + y < 1
    assert row["text_area_fraction"] == pytest.approx(0.5, abs=0.005)


def test_union_of_areas_against_a_count_of_random_points():
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(200_000, 2))
    for count in (1, 2, 5):
        polygons, inside = [], np.zeros(len(points), bool)
        for _ in range(count):  # rotated rectangles, cut to triangles now and then
            centre, axes = rng.uniform(0.3, 0.7, 2), rng.uniform(0.02, 0.25, 2)
            turn = rng.uniform(0, np.pi)
            frame = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * axes
            polygons.append(corners @ frame + centre)
            local = np.abs((points - centre) @ frame.T)
            inside |= (local <= axes).all(axis=1)
        assert covered_fraction(polygons) == pytest.approx(inside.mean(), abs=0.004)
    assert covered_fraction([]) == 0.0
    sliver = np.array([[0.2, 0.2], [0.9, 0.2], [0.9, 0.2], [0.2, 0.2]])
    assert covered_fraction([sliver]) == 256.0**-2  # text was read, so it is not nothing
    whole = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert covered_fraction([whole, whole]) == 1.0


def test_a_bad_image_and_an_engine_crash_are_counted_and_the_run_goes_on():
    engine = Scripted(regions=[Region("a", 0.9, ((0, 0), (9, 0), (9, 9)))], crash_on=[1])
    batch = samples(drawing("OK"), drawing("OK"), drawing("OK"))
    batch.append({"uid": "x", "image": b"no image"})
    rows = TextSpotting(engine=engine).annotate(batch)
    assert [texts(row) for row in rows] == [["a"], [], ["a"], []]
    errors = [row["text_spotting_error"] for row in rows]
    assert errors == [None, "engine_RuntimeError", None, "not_an_image"]
    assert [row["text_area_fraction"] is None for row in rows] == [False, True, False, True]


def test_the_real_engine_given_garbage_is_counted(spotting):
    class Garbage(RapidOcr):
        def spot(self, image):  # an image that the models cannot take
            return super().spot(image[:, :, :1].astype(np.complex64))

    row = TextSpotting(engine=Garbage()).annotate(samples(drawing("OK")))[0]
    assert row["text_spotting_error"].startswith("engine_")
    assert row["spotted_text"] == []


def test_an_engine_that_fails_everywhere_stops_the_run():
    batch = samples(*[Image.new("RGB", (8, 8))] * 40)
    few = TextSpotting(engine=Scripted(crash_on=range(16))).annotate(batch)
    assert sum(row["text_spotting_error"] is not None for row in few) == 16
    with pytest.raises(ValueError, match=r"17 of 40 images \(engine_RuntimeError\)"):
        TextSpotting(engine=Scripted(crash_on=range(17))).annotate(batch)
    allowed = TextSpotting(engine=Scripted(crash_on=range(40)), max_failed_fraction=1.0)
    assert len(allowed.annotate(batch)) == 40


def test_an_engine_that_cannot_be_built_stops_the_run(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError):
        TextSpotting().annotate(samples(drawing("OK")))


def test_a_provider_that_is_not_there_stops_the_run(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailable, match="install onnxruntime-gpu"):
        TextSpotting(engine=RapidOcr(provider="cuda")).annotate(samples(drawing("OK")))


def test_a_provider_that_does_not_load_stops_the_run(monkeypatch):
    """onnxruntime lists CUDA and falls back: the library is there, its GPU libraries are not."""
    import onnxruntime
    import rapidocr_onnxruntime.utils.infer_engine as sessions

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    for module in (onnxruntime, sessions):
        monkeypatch.setattr(module, "get_available_providers", lambda: both)
    with pytest.raises(EngineUnavailable, match="runs CPUExecutionProvider"):
        TextSpotting(engine=RapidOcr(provider="cuda")).annotate(samples(drawing("OK")))


def test_the_engine_does_not_travel(spotting):
    spotting.annotate(samples(drawing("OK")))
    assert spotting.engine._engine is not None
    copy = pickle.loads(pickle.dumps(spotting))
    assert copy.engine._engine is None
    assert copy.min_side == spotting.min_side


def test_presets_build():
    cfg = composed("curate", ["pool=p", "out=o", "+annotate@annotate.t=text_spotting_cuda"])
    assert problems(cfg) == []
    annotator = build(cfg.annotate.t)
    assert (annotator.engine.provider, annotator.min_side) == ("cuda", 384)
    plain = build(OmegaConf.load(Path(CONF, "annotate", "text_spotting.yaml")))
    assert plain.engine.provider == "cpu"
    assert (plain.min_side, plain.min_confidence) == (64, TextSpotting().min_confidence)


def test_another_engine_is_named_on_the_command_line():
    node = "annotate.t.engine"
    overrides = [
        "+annotate@annotate.t=text_spotting",
        f"~{node}",
        f"+{node}._target_=fractions.Fraction",
    ]
    cfg = composed("curate", ["pool=p", "out=o", *overrides])
    assert problems(cfg) == []
    assert build(cfg.annotate.t).engine == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"min_side": 0}, "min_side 0"),
        ({"min_side": 100, "max_side": 50}, "max_side 50"),
        ({"min_confidence": 1.5}, "min_confidence 1.5"),
        ({"max_failed_fraction": -0.1}, "max_failed_fraction -0.1"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        TextSpotting(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"), [({"threads": 0}, "threads 0"), ({"provider": "tpu"}, "'tpu'")]
)
def test_bad_knobs_of_the_engine(knobs, message):
    with pytest.raises(ValueError, match=message):
        RapidOcr(**knobs)
