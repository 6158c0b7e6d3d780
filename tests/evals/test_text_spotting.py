"""The probe with a model that reads, one that looks, one that does neither, and by brute force."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from pipeline.evals.text_spotting import (
    STYLES,
    TextSpotting,
    attack_metrics,
    lettered,
    png,
    sync_metrics,
    writable,
    wrong_class,
)
from tests.evals.on_sphere import OnSphere

NAMES = ["cat", "red dog", "emu", "Ant", "crane", "dog", "hippopotamus", "crane"]
LABELS = [0, 1, 2, 3, 4, 5, 6, 7, 1, 1, 0]
WORDS = [0, 2, 3, 5]  # single short words that name one class


def plain(label, number, side=(40, 32)):
    """A picture of one shade for each class; `number` makes its bytes its own."""
    picture = Image.new("RGB", side, (20 * label + 10, 255 - 20 * label, 100))
    picture.putpixel((0, 0), (number, 0, 0))
    return png(picture)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\na {c}\n")
    (tmp_path / "test" / "nshards.txt").write_text("1\n")
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for number, label in enumerate(LABELS):
            for suffix, content in (
                ("png", plain(label, number)),
                ("cls", str(label).encode()),
            ):
                info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(tmp_path)


def opened(image):
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)


class Eyes(OnSphere):
    """Sees the class by the shade in the middle of the upper half; text is the class's axis."""

    def text_embed(self, captions, *, batch_size=256):
        return torch.eye(len(NAMES))[[NAMES.index(c.removeprefix("a ")) for c in captions]]

    def image_embed(self, images, *, batch_size=256):
        return torch.eye(len(NAMES))[[self.sees(opened(image)) for image in images]]

    def sees(self, pixels):
        return min(7, max(0, round((pixels[len(pixels) // 4, len(pixels) // 2, 0] - 10) / 20)))


class Reader(Eyes):
    """Takes a picture for the class whose name is written on its foot, or alone on it."""

    def __init__(self):
        self.words = {}
        for word in WORDS:
            drawn = [lettered(NAMES[word], (64, 16), ("black", "white"))]
            drawn += [lettered(NAMES[word], (64, 64), style) for style in STYLES]
            self.words |= {opened(png(picture)).tobytes(): word for picture in drawn}

    def sees(self, pixels):
        known = [self.words.get(part.tobytes()) for part in (pixels, pixels[-16:])]
        return next((word for word in known if word is not None), super().sees(pixels))


class Noise(Eyes):
    """A random linear map of an image's pixels, a random vector of a text."""

    def text_embed(self, captions, *, batch_size=256):
        rows = [np.random.default_rng(list(text.encode())).normal(size=3) for text in captions]
        return normalize(torch.tensor(np.array(rows)).float(), dim=-1)

    def image_embed(self, images, *, batch_size=256):
        rows = []
        for image in images:
            pixels = opened(image)[::4, ::4].ravel() / 255 - 0.5
            rows.append(np.random.default_rng(0).normal(size=(3, len(pixels))) @ pixels)
        return normalize(torch.tensor(np.array(rows)).float(), dim=-1)


def probe(data, **knobs):
    return TextSpotting(data=data, **{"side": 64, "band": 0.25} | knobs)


def test_who_only_looks_does_not_fall_for_words(data):
    found = probe(data).run(Eyes())
    # the two cranes share a name, hence one text embedding, and take each other's place
    expected = sum(label not in (4, 7) for label in LABELS) / len(LABELS)
    for kind in ("", "band_", "word_"):
        assert found[f"{kind}top1"] == pytest.approx(expected)
    assert found["drop_top1"] == found["attack_success"] == found["pull"] == 0.0
    assert found["sync_r_at_1"] < 1.0


def test_who_reads_takes_the_word(data):
    found = probe(data).run(Reader())
    assert found["band_top1"] == found["top1"] > 0.7
    assert found["word_top1"] == 0.0
    assert found["drop_top1"] == found["top1"]
    assert (found["attack_success"], found["attack_success_band"]) == (1.0, 0.0)
    assert found["word_percentile"] == 1.0
    assert found["pull"] == 1.0 - found["band_percentile"] > 0.5
    assert (found["sync_cosine"], found["sync_gap"], found["sync_r_at_1"]) == (1.0, 1.0, 1.0)


def by_hand(task, model):
    """All numbers with loops over images, words and classes."""
    classes = []
    for name in NAMES:
        mean = model.text_embed([name, f"a {name}"]).mean(0)
        classes.append(mean / mean.norm())
    samples = list(task.zero_shot.images.samples())
    hits = {}
    for image, label in samples:
        word = wrong_class(image, label, NAMES, WORDS, task.seed)
        pictures = {"": image, "band_": task.written(image, "")}
        pictures["word_"] = task.written(image, NAMES[word])
        for kind, picture in pictures.items():
            embed = model.image_embed([picture])[0]
            cosine = [float(embed @ c) for c in classes]
            for what, mine in (("own", label), ("word", word)):
                place = sum(c >= cosine[mine] - 1e-6 for n, c in enumerate(cosine) if n != mine)
                hits.setdefault((kind, what), []).append(place)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    found = {}
    for kind in ("", "band_", "word_"):
        for k in (1, 5):
            found[f"{kind}top{k}"] = mean([place < k for place in hits[kind, "own"]])
    for kind in ("band_", "word_"):
        found[f"{kind}percentile"] = mean([1 - p / 7 for p in hits[kind, "word"]])
    for k in (1, 5):
        found[f"drop_top{k}"] = found[f"top{k}"] - found[f"word_top{k}"]
    found["attack_success"] = mean([p == 0 for p in hits["word_", "word"]])
    found["attack_success_band"] = mean([p == 0 for p in hits["band_", "word"]])
    found["pull"] = found["word_percentile"] - found["band_percentile"]
    own, gap, places = [], [], []
    texts = model.text_embed([NAMES[word] for word in WORDS])
    for style in STYLES:
        for number, word in enumerate(WORDS):
            picture = png(lettered(NAMES[word], (64, 64), style))
            cosine = [float(model.image_embed([picture])[0] @ text) for text in texts]
            others = [c for n, c in enumerate(cosine) if n != number]
            own.append(cosine[number])
            gap.append(cosine[number] - mean(others))
            places.append(sum(c >= cosine[number] - 1e-6 for c in others))
    found |= {"sync_cosine": mean(own), "sync_gap": mean(gap)}
    found["sync_percentile"] = mean([1 - place / 3 for place in places])
    found["sync_r_at_1"] = mean([place == 0 for place in places])
    return found


@pytest.mark.parametrize(("batch_size", "seed"), [(1, 0), (4, 1), (256, 0)])
def test_brute_force(data, batch_size, seed):
    task = probe(data, batch_size=batch_size, seed=seed)
    found = task.run(Noise())
    assert found == pytest.approx(by_hand(task, Noise()), abs=1e-6)
    assert 0 < found["attack_success"] < 1  # so that the comparison compares something
    assert 0 < found["sync_r_at_1"] < 1


def test_metrics_by_hand():
    clean = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.9, 0.5]])
    word = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.9, 0.8]])
    found = attack_metrics(
        {"clean": clean, "band": clean, "word": word}, torch.tensor([0, 1]), torch.tensor([1, 2])
    )
    assert (found["top1"], found["word_top1"], found["drop_top1"]) == (1.0, 0.5, 0.5)
    assert (found["attack_success"], found["attack_success_band"]) == (0.5, 0.0)
    assert (found["band_percentile"], found["word_percentile"]) == (0.5, 0.75)
    assert found["pull"] == 0.25
    sync = sync_metrics(torch.tensor([[[0.5, 0.25], [0.75, 0.25]]]))
    assert sync == {
        "sync_cosine": 0.375,
        "sync_gap": (0.25 - 0.5) / 2,
        "sync_percentile": 0.5,
        "sync_r_at_1": 0.5,
    }


def test_the_word_is_never_right_and_a_function_of_the_image():
    assert writable(NAMES, 6) == WORDS
    seen = set()
    for number in range(60):
        for label in range(len(NAMES)):
            image = plain(label, number)
            word = wrong_class(image, label, NAMES, WORDS, 0)
            assert word == wrong_class(image, label, NAMES, WORDS, 0)
            assert word in WORDS
            assert word != label
            assert not (NAMES[label] == "red dog" and NAMES[word] == "dog")
            seen.add((label, word))
    assert (
        len(seen) == 8 * 4 - 5
    )  # every word but those that are in the name: cat emu Ant dog twice
    images = [plain(0, number) for number in range(20)]
    drawn = [[wrong_class(i, 0, NAMES, WORDS, seed) for i in images] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("word", ["cat", "hippopotamus", "gypsy", "ill"])
@pytest.mark.parametrize("size", [(128, 38), (38, 128), (224, 224)])
def test_letters_are_inside_large_and_in_the_middle(word, size):
    ink = 255 - opened(png(lettered(word, size, ("black", "white"))))[:, :, 0]
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    shares = [np.ptp(columns) / size[0], np.ptp(rows) / size[1]]
    assert max(shares) <= 0.95
    assert max(shares) >= 0.7
    assert abs(rows[0] + rows[-1] - size[1]) <= 4 + 0.05 * size[1]
    assert (
        abs(columns[0] + columns[-1] - size[0]) <= 4 + 0.05 * size[0]
    )  # side bearings count as ink


def test_only_the_foot_is_covered(data):
    image = plain(3, 0)
    empty, written = (opened(probe(data).written(image, word)) for word in ("", "cat"))
    assert empty.shape == (64, 64, 3)
    assert np.array_equal(empty[:48], written[:48])
    assert (empty[48:] == 255).all()
    assert (written[48:] < 100).any()
    assert abs(empty[10, 32] - opened(image)[5, 20]).max() <= 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"band": 0.0}, r"band 0\.0"),
        ({"side": 8}, "side=8"),
        ({"max_letters": 2}, "max_letters=2"),
    ],
)
def test_bad_knobs(data, knobs, message):
    with pytest.raises(ValueError, match=message):
        probe(data, **knobs)


def test_too_few_words():
    with pytest.raises(ValueError, match=r"1 of 3 class names .*raise max_letters"):
        writable(["cat", "hippopotamus", "two words"], 6)
    with pytest.raises(ValueError, match="every candidate word is in the class name 'cat emu'"):
        wrong_class(b"x", 2, ["cat", "emu", "cat emu"], [0, 1], 0)
