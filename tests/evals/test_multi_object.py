"""Encoders whose bias is known."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from pipeline.data.images import decode
from pipeline.evals.multi_object import BOTH, MultiObject, composed
from tests.evals.on_sphere import OnSphere

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "pink": (255, 0, 255),
}
NAMES = list(COLOURS)


@pytest.fixture
def data(tmp_path):
    """A square of each colour."""
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for label, colour in enumerate(COLOURS.values()):
            sink = io.BytesIO()
            Image.new("RGB", (8, 8), colour).save(sink, "PNG")
            for suffix, content in (("png", sink.getvalue()), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{label}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(tmp_path)


class Planted(OnSphere):
    """An axis a colour. weigh_text(places) and weigh_area(area) say how much of each is seen."""

    def __init__(self, weigh_text, weigh_area):
        self.weigh_text, self.weigh_area = weigh_text, weigh_area

    def text_embed(self, captions, *, batch_size=256):
        rows = torch.zeros(len(captions), len(NAMES))
        for row, caption in zip(rows, captions, strict=True):
            found = sorted((caption.split().index(n), n) for n in NAMES if n in caption.split())
            for place, (_, name) in enumerate(found):
                row[NAMES.index(name)] = self.weigh_text(place)
        return normalize(rows + 1e-12, dim=-1)

    def image_embed(self, images, *, batch_size=256):
        rows = torch.zeros(len(images), len(NAMES))
        for row, image in zip(rows, images, strict=True):
            pixels = np.asarray(decode(image)).reshape(-1, 3)
            for number, colour in enumerate(COLOURS.values()):
                row[number] = self.weigh_area(float((pixels == colour).all(1).mean()))
        return normalize(rows + 1e-12, dim=-1)


def bag(place):
    return 1.0


def seen(area):
    return float(area > 0)


def test_a_bag_of_words_has_no_order_and_sees_what_is_there(data):
    found = MultiObject(data=data, side=64, pairs=15).run(Planted(bag, seen))
    assert found["text_first"] == found["image_large"] == 0.5
    assert found["match_large_first"] == found["match_small_first"] == 1
    assert found["match_drop"] == 0


def test_a_first_token_encoder_keeps_the_first(data):
    first = Planted(lambda place: float(place == 0), seen)
    found = MultiObject(data=data, side=64, pairs=15).run(first)
    assert found["text_first"] == 1
    # the caption with a wrong second object is the same to it: a tie
    assert found["match_large_first"] == 0


def test_an_encoder_that_sees_the_left_half_alone_shows_no_bias_of_size(data):
    class Left(Planted):
        def image_embed(self, images, *, batch_size=256):
            halves = []
            for image in images:
                picture = decode(image)
                found = np.asarray(picture)
                columns = np.flatnonzero((found != 255).any((0, 2)))  # where anything stands
                sink = io.BytesIO()
                left = int(columns[0])
                picture.crop((left, 0, left + 8, picture.height)).save(sink, "PNG")
                halves.append(sink.getvalue())
            return super().image_embed(halves)

    found = MultiObject(data=data, side=64, pairs=14).run(Left(bag, seen))
    assert found["image_large"] == 0.5


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_an_area_weighted_encoder_keeps_the_larger(data, power):
    found = MultiObject(data=data, side=64, pairs=15).run(Planted(bag, lambda area: area**power))
    assert found["image_large"] == 1


def test_a_size_bias_shows_in_the_drop(data):
    """The picture is mostly its larger object, the text mostly what it names first."""
    biased = Planted(lambda place: (1.0, 0.2)[place], lambda area: area)
    found = MultiObject(data=data, side=64, pairs=15).run(biased)
    large, small = 0.6**2, 0.3**2
    unit = lambda *v: torch.tensor(v) / torch.tensor(v).norm()  # noqa: E731
    picture = unit(large, small, 0.0)
    right = float(picture @ unit(1.0, 0.2, 0.0))
    assert right > float(picture @ unit(1.0, 0.0, 0.2))
    assert found["match_large_first"] == 1
    reverse, wrong = unit(0.2, 1.0, 0.0), unit(0.2, 0.0, 1.0)
    assert found["match_small_first"] == float(picture @ reverse > picture @ wrong)
    assert found["match_drop"] == found["match_large_first"] - found["match_small_first"]


def test_scenes_have_three_classes_and_do_not_depend_on_the_order_of_pairs(data):
    scenes = MultiObject(data=data, pairs=100).scenes()
    assert len(scenes) == 15  # five classes, three steps
    assert len({scene[:2] for scene in scenes}) == 15
    assert all(len(set(scene[:3])) == 3 for scene in scenes)
    assert MultiObject(data=data, pairs=4).scenes() == scenes[:4]
    assert MultiObject(data=data, pairs=100, seed=1).scenes() != scenes


def test_the_objects_have_their_sizes():
    def square(colour):
        sink = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(sink, "PNG")
        return sink.getvalue()

    made = composed((square((255, 0, 0)), square((0, 0, 255))), 100, (0.6, 0.3))
    pixels = np.asarray(decode(made)).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 3600
    assert (pixels == (0, 0, 255)).all(1).sum() == 900
    assert BOTH.count("{") == 2


@pytest.mark.parametrize(
    "knobs",
    [{"large": 0.8, "small": 0.3}, {"small": 0.7}, {"pairs": 0}, {"small": 0.0}, {"side": 4}],
)
def test_sizes_that_do_not_fit(knobs, data):
    with pytest.raises(ValueError, match="their sum at most 1"):
        MultiObject(data=data, **knobs)
