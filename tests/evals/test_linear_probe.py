"""A linear classifier on features whose classes are known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.evals.linear_probe import LinearProbe
from tests.evals.test_labelled import parquet


def splits(folder, sizes=(120, 60), classes=3):
    """Image i of label l is b"i l"; the names of the splits are `train` and `test`."""
    for split, size in zip(("train", "test"), sizes, strict=True):
        parquet(folder, labels=[n % classes for n in range(size)])
        for file in folder.glob("test-*"):
            file.rename(folder / file.name.replace("test", f"{split}@"))
    for file in folder.glob("*@*"):
        file.rename(folder / file.name.replace("@", ""))
    return str(folder)


class Planted:
    """Features of an image: its class's corner plus noise of its own."""

    def __init__(self, noise, width=8):
        self.noise, self.width = noise, width

    def image_features(self, images, *, batch_size=256):
        rows = []
        for image in images:
            number, label = map(int, image.split())
            rng = np.random.default_rng([number, label])
            corner = np.eye(self.width)[label]
            rows.append(5 + 100 * (corner + self.noise * rng.standard_normal(self.width)))
        return torch.tensor(np.array(rows), dtype=torch.float32)


def test_separable_classes_are_found(tmp_path):
    found = LinearProbe(data=splits(tmp_path)).run(Planted(0.05))
    assert found["top1"] == found["mean_per_class_recall"] == 1.0
    chance = LinearProbe(data=splits(tmp_path), strengths=[1.0]).run(Planted(1e6))
    assert chance["top1"] < 0.6


def test_it_is_scikit_learns(tmp_path):
    trained, data = Planted(0.8), splits(tmp_path)
    probe = LinearProbe(data=data, strengths=[0.01])
    (train, labels), (test, wanted) = (probe._features(trained, split) for split in probe.splits)
    centre, spread = train.mean(0), train.std(0)
    direct = LogisticRegression(C=0.01, max_iter=1000).fit((train - centre) / spread, labels)
    found = probe.run(trained)
    assert 0.4 < found["top1"] < 0.95
    assert found["top1"] == direct.score((test - centre) / spread, wanted)
    assert found["strength"] == 0.01


def test_the_strength_is_chosen_on_a_part_of_the_training_split(tmp_path):
    data = splits(tmp_path, sizes=(300, 300))
    noisy = Planted(0.8, width=128)
    found = LinearProbe(data=data, strengths=[1e-3, 1e3], validation_fraction=0.4).run(noisy)
    each = {s: LinearProbe(data=data, strengths=[s]).run(noisy)["top1"] for s in (1e-3, 1e3)}
    assert found["strength"] == max(each, key=each.get)
    assert found["top1"] == max(each.values())


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"strengths": []}, "need some above 0"),
        ({"strengths": [0.0]}, "need some above 0"),
        ({"validation_fraction": 1.0}, "a fraction in"),
        ({"validation_fraction": 0.99}, "lower validation_fraction"),
        ({"train_split": "no"}, "no"),
    ],
)
def test_what_cannot_be_fitted(knobs, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        LinearProbe(data=splits(tmp_path), **knobs).run(Planted(0.1))


def test_one_class_is_no_problem_to_solve(tmp_path):
    with pytest.raises(ValueError, match=r"has images of \{0\} alone"):
        LinearProbe(data=splits(tmp_path, classes=1)).run(Planted(0.1))
