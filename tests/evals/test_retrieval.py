"""Recall in both directions, by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from pipeline.evals import retrieval
from pipeline.evals.retrieval import Retrieval, distinct, places_of, retrieval_metrics
from pipeline.metric import Cosine
from pipeline.shards import Record, content_uid, write_manifest, write_shard
from tests.evals.on_sphere import OnSphere

EMOJI = Path(__file__).parents[2] / "examples" / "emoji" / "eval"


def test_by_hand():
    # rows are images, columns captions; the diagonal is right
    similarity = torch.tensor([[0.9, 0.2, 0.1], [0.95, 0.5, 0.1], [0.3, 0.6, 0.4]])
    pairs = torch.tensor([[0, 0], [1, 1], [2, 2]])
    # images: 0 hits, 1 is beaten by caption 0, 2 by caption 1
    # captions: 0 is beaten by image 1, 1 by image 2, 2 hits
    assert retrieval_metrics(similarity, pairs, at=(1, 2)) == {
        "image_to_text_r_at_1": pytest.approx(1 / 3),
        "image_to_text_r_at_2": 1.0,
        "text_to_image_r_at_1": pytest.approx(1 / 3),
        "text_to_image_r_at_2": 1.0,
    }


def test_several_captions_of_an_image_and_several_images_of_a_caption():
    # image 0 has captions 0 and 1; caption 2 has images 1 and 2
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.3, 0.6], [0.7, 0.1, 0.2]])
    pairs = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 2]])
    # images: 0 by caption 1, 1 by caption 2, 2 wrong (caption 0); captions: 0 wrong (image 2),
    # 1 hits, 2: its better image has 0.6, before image 0 with 0.5
    metrics = retrieval_metrics(similarity, pairs, at=(1,))
    assert metrics["image_to_text_r_at_1"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_r_at_1"] == pytest.approx(2 / 3)


def test_equal_images_and_captions_are_one_item():
    images, captions, pairs = distinct([(b"a", "x"), (b"b", "x"), (b"a", "y")])
    assert (images, captions) == ([b"a", b"b"], ["x", "y"])
    assert pairs.tolist() == [[0, 0], [1, 0], [0, 1]]


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image_embed, text_embed = (
        normalize(torch.randn(n, 6, generator=generator), dim=-1) for n in (23, 17)
    )
    pairs = torch.stack([torch.arange(23), torch.arange(23) % 17], dim=1)
    whole = retrieval_metrics(image_embed @ text_embed.T, pairs)
    monkeypatch.setattr(retrieval, "CHUNK", 5)
    places = places_of(image_embed, text_embed, pairs, Cosine().similarity)
    assert len(places) == 23
    assert float((places < 5).double().mean()) == whole["image_to_text_r_at_5"]
    places = places_of(text_embed, image_embed, pairs.flip(1), Cosine().similarity)
    assert float((places < 5).double().mean()) == whole["text_to_image_r_at_5"]


class ByLength(OnSphere):
    """An image and a caption match when they are equally long."""

    def image_embed(self, images, *, batch_size=256):
        return torch.eye(64)[[len(image) for image in images]]

    def text_embed(self, captions, *, batch_size=256):
        return torch.eye(64)[[len(caption) for caption in captions]]


def test_over_a_shards_directory(tmp_path):
    texts = ["a", "bb", "ccc", "dddd"]
    pairs = [Record(f"{n:032x}", b"i" * len(t), "png", t, {}) for n, t in enumerate(texts)]
    pairs.append(Record("f" * 32, b"iiiii", "png", "a", {}))  # a wrong pair: 5 is not 1
    entry = write_shard(tmp_path, "shard-000000", pairs)
    write_manifest(tmp_path, {"num_samples": 5, "shards": [entry], "steps": []})
    metrics = Retrieval(data=str(tmp_path)).run(ByLength())
    assert metrics["image_to_text_r_at_1"] == pytest.approx(4 / 5)
    assert metrics["text_to_image_r_at_1"] == 1.0  # "a" is found by the image it fits
    assert set(metrics) == {
        f"{way}_r_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    assert Retrieval(data=str(tmp_path), max_pairs=4).run(ByLength())["image_to_text_r_at_1"] == 1.0


def test_over_a_labelled_set():
    """The caption of an image is its class name in the first template, "{c}"."""
    pairs = list(Retrieval(data=str(EMOJI)).pairs())
    names = (EMOJI / "classnames.txt").read_text().splitlines()
    assert len(pairs) == 1190
    assert {caption for _, caption in pairs} == set(names)
    assert pairs[0][0][8:12] == b"WEBP"


def test_an_empty_set(tmp_path):
    write_manifest(tmp_path, {"num_samples": 0, "shards": [], "steps": []})
    with pytest.raises(ValueError, match="no pairs"):
        Retrieval(data=str(tmp_path)).run(ByLength())


def test_five_thousand_images_and_five_captions_each_fit(root):
    """5,000 x 25,000 with D = 512: the whole similarity, twice with ranks, would be 4 GiB."""
    program = (
        "import resource, torch\n"
        "from torch.nn.functional import normalize\n"
        "from pipeline.evals.retrieval import places_of\n"
        "from pipeline.metric import Cosine\n"
        "images, texts = torch.randn(5000, 512), torch.randn(25000, 512)\n"
        "own = torch.arange(25000) // 5\n"
        "texts += images[own]\n"
        "images, texts = normalize(images, dim=-1), normalize(texts, dim=-1)\n"
        "pairs = torch.stack([own, torch.arange(25000)], dim=1)\n"
        "near = Cosine().similarity\n"
        "there = places_of(images, texts, pairs, near)\n"
        "back = places_of(texts, images, pairs.flip(1), near)\n"
        "assert len(there) == 5000 and len(back) == 25000\n"
        "assert (there == 0).float().mean() > 0.99\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4


def test_all_captions_of_a_record(tmp_path, make_picture):
    made = []
    for number in range(4):
        image = make_picture(number)
        info = {"captions": [{"text": f"own {number}"}, {"text": f"other {number}"}, {"text": ""}]}
        uid = content_uid(image, f"own {number}")
        made.append(Record(uid, image, "png", f"own {number}", {"uid": uid, **info}))
    entry = write_shard(tmp_path, "shard-000000", made)
    write_manifest(tmp_path, {"num_samples": 4, "shards": [entry], "steps": []})
    assert len(list(Retrieval(data=str(tmp_path)).pairs())) == 4
    pairs = list(Retrieval(data=str(tmp_path), captions="all").pairs())
    assert len(pairs) == 8 and {caption for _, caption in pairs} >= {"own 1", "other 1"}
    with pytest.raises(ValueError, match="'primary' or 'all'"):
        Retrieval(data=str(tmp_path), captions="each")
