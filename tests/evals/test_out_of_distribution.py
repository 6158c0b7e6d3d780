"""Known against unknown classes."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipeline.evals.out_of_distribution import OutOfDistribution, auroc, fpr95, parted
from tests.evals.test_zero_shot import Known, write_set


@pytest.mark.parametrize("values", [3, 1000])  # many ties, few
def test_auroc_is_scikit_learns(values):
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(values, (200,), generator=generator).double() + values / 4
    unknown = torch.randint(values, (300,), generator=generator).double()
    labels = [1] * 200 + [0] * 300
    expected = roc_auc_score(labels, torch.cat([known, unknown]).numpy())
    assert auroc(known, unknown) == pytest.approx(expected, abs=1e-12)


def test_fpr95_by_hand():
    known = torch.arange(1.0, 101)  # 95 of 100 are 6 and above
    unknown = torch.tensor([5.0, 5.9, 6.0, 7.0])
    assert fpr95(known, unknown) == 0.5  # a tie passes
    assert fpr95(known, unknown - 10) == 0
    assert fpr95(torch.arange(20.0), torch.tensor([0.5, 1.0])) == 0.5


class Vague(Known):
    """An image of an emu is near nothing that it was told of."""

    logit_scale = 10.0

    def image_embed(self, images, *, batch_size=256):
        known = super().image_embed(images)
        emu = torch.tensor([[int(image.split()[1]) == 2] for image in images])
        return torch.where(emu, torch.full_like(known, 3**-0.5), known)


def test_unknown_images_are_found(tmp_path):
    inside = write_set(tmp_path / "in", labels=(0, 1, 1, 0))
    outside = write_set(tmp_path / "out", labels=(2, 2))
    found = OutOfDistribution(data=str(inside), outside=str(outside)).run(Vague())
    assert found == {
        **{"known_images": 4.0, "unknown_images": 2.0},
        **{"mcm_auroc": 1.0, "mcm_fpr95": 0.0, "cosine_auroc": 1.0, "cosine_fpr95": 0.0},
    }
    # the prompts of the unknown set take no part
    same = OutOfDistribution(data=str(inside), outside=str(inside), temperature=1.0).run(Vague())
    assert same["mcm_auroc"] == 0.5 and same["mcm_fpr95"] == 1.0


class Named:
    def __init__(self, names):
        self.names = names

    def class_names(self):
        return self.names


def test_a_part_of_the_classes_is_held_out():
    names = [f"class {n}" for n in range(100)] + ["crane", "crane"]
    known, unknown = parted(Named(names), 0.3, 0)
    assert len(unknown) == 30 and sorted(known + unknown) == sorted(names[:100])
    assert parted(Named(names[::-1]), 0.3, 0)[1] == unknown[::-1]
    assert parted(Named(names), 0.3, 1)[1] != unknown


def test_the_held_out_classes_are_no_prompts(tmp_path):
    data = write_set(tmp_path, labels=(0, 1, 2, 0, 1, 2))
    task = OutOfDistribution(data=str(data), held_out=0.34)
    (held,) = set(task.unknown.images.class_names())
    assert held not in task.known.images.class_names()
    found = task.run(Vague())
    assert (found["known_images"], found["unknown_images"]) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"held_out": 0.9}, "need two known"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_what_cannot_be_asked(knobs, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        OutOfDistribution(data=str(write_set(tmp_path)), **knobs)
