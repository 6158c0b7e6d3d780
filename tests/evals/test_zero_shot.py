"""Zero-shot classification on a hand-made set, with embedders whose answers are known."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.evals.task import SHARED_BATCHES
from pipeline.evals.zero_shot import ZeroShot, classification_metrics
from tests.evals.on_sphere import OnSphere

EMOJI = Path(__file__).parents[2] / "examples" / "emoji" / "eval"
NAMES = ["cat", "dog", "emu"]


def write_set(directory, labels=(0, 1, 2, 1), *, templates="{c}\na {c}\n", per_shard=3):
    """Image i is the bytes b"i <label>"."""
    (directory / "test").mkdir(parents=True)
    (directory / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (directory / "zeroshot_classification_templates.txt").write_text(templates)
    shards = [labels[n : n + per_shard] for n in range(0, len(labels), per_shard)]
    (directory / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    number = 0
    for shard, shard_labels in enumerate(shards):
        with tarfile.open(directory / "test" / f"{shard}.tar", "w") as tar:
            for label in shard_labels:
                image = ("webp", f"{number} {label}".encode())
                members = [image, ("cls", str(label).encode())]
                for suffix, content in members if number % 2 else members[::-1]:
                    info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    return directory


class Known(OnSphere):
    """Image i of label l is the axis `sees[i]`, or l; a prompt is the axis of its class."""

    def __init__(self, sees=None):
        self.sees = sees or {}
        self.batches = []

    def image_embed(self, images, *, batch_size=256):
        self.batches.append(len(images))
        pairs = [tuple(map(int, image.split())) for image in images]
        return torch.eye(len(NAMES))[[self.sees.get(number, label) for number, label in pairs]]

    def text_embed(self, captions, *, batch_size=256):
        return torch.eye(len(NAMES))[[NAMES.index(caption.split()[-1]) for caption in captions]]


def test_by_hand():
    # classes 0, 0, 1: hits at 1 for the first and the third; class 2 has no image
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.5, 0.4], [0.1, 0.3, 0.2]])
    assert classification_metrics(scores, torch.tensor([0, 0, 1])) == {
        "top1": pytest.approx(2 / 3),
        "top5": 1.0,
        "mean_per_class_recall": pytest.approx((1 / 2 + 1) / 2),
    }


def test_top5_of_many_classes():
    scores = -torch.arange(10.0).repeat(3, 1)  # class k stands at place k
    metrics = classification_metrics(scores, torch.tensor([0, 4, 5]))
    assert metrics == {
        "top1": pytest.approx(1 / 3),
        "top5": pytest.approx(2 / 3),
        "mean_per_class_recall": pytest.approx(1 / 3),
    }


def test_a_perfect_and_a_wrong_model(tmp_path):
    task = ZeroShot(data=str(write_set(tmp_path / "set")))
    assert task.run(Known())["top1"] == 1.0
    # image 3 is a dog taken for a cat: 3 of 4 images, classes (1, 1/2, 1)
    metrics = task.run(Known({3: 0}))
    assert metrics["top1"] == pytest.approx(3 / 4)
    assert metrics["mean_per_class_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts(tmp_path):
    templates = "{c}\na {c}\nmany {c}s\n"
    task = ZeroShot(data=str(write_set(tmp_path / "set", templates=templates)), batch_size=2)

    class Hashed(Known):
        def text_embed(self, captions, *, batch_size=256):
            rows = [torch.Generator().manual_seed(sum(map(ord, text))) for text in captions]
            return normalize(torch.stack([torch.randn(8, generator=row) for row in rows]), dim=-1)

    embedder = Hashed()
    expected = []
    for name in NAMES:
        mean = embedder.text_embed([name, f"a {name}", f"many {name}s"]).mean(dim=0)
        expected.append(mean / mean.norm())
    torch.testing.assert_close(task.class_embed(embedder), torch.stack(expected))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_numbers_do_not_depend_on_the_batch_size(tmp_path, batch_size):
    data = str(write_set(tmp_path / "set", labels=(0, 1, 2, 1, 0, 2, 1)))
    embedder = Known({2: 0, 5: 1})
    metrics = ZeroShot(data=data, batch_size=batch_size).run(embedder)
    assert sum(embedder.batches) == 7
    assert max(embedder.batches) <= SHARED_BATCHES * batch_size
    assert metrics == ZeroShot(data=data).run(Known({2: 0, 5: 1}))


def test_the_example_set_is_complete():
    task = ZeroShot(data=str(EMOJI))
    labels = [label for _, label in task.images.samples()]
    assert sorted(labels) == list(range(1190))
    assert len(task.images.class_names()) == len(set(task.images.class_names())) == 1190


def test_what_is_wrong_with_a_set(tmp_path):
    with pytest.raises(ValueError, match=r"templates\.txt is missing: `data` must be"):
        ZeroShot(data=str(tmp_path)).run(Known())
    outside = write_set(tmp_path / "outside", labels=(0, 3))
    with pytest.raises(ValueError, match=r"s0000001\.cls is 3, .* 3 lines"):
        ZeroShot(data=str(outside)).run(Known())
    no_place = write_set(tmp_path / "no_place", templates="a {}\n")
    with pytest.raises(ValueError, match=r"no \{c\} in 'a \{\}'"):
        ZeroShot(data=str(no_place)).run(Known())
    shard_gone = write_set(tmp_path / "gone")
    (shard_gone / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"1\.tar is missing"):
        ZeroShot(data=str(shard_gone)).run(Known())
    alone = write_set(tmp_path / "alone", labels=())
    (alone / "test" / "nshards.txt").write_text("1\n")
    with tarfile.open(alone / "test" / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("s0000000.webp"), io.BytesIO())
    with pytest.raises(ValueError, match="s0000000 has only its image"):
        ZeroShot(data=str(alone)).run(Known())
