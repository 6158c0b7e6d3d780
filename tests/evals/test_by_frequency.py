"""Head, middle and tail against loops over captions, classes and ranks."""

import io
import json
import random
import re
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pipeline.check import composed
from pipeline.config import check
from pipeline.evals.by_frequency import (
    ByFrequency,
    class_counts,
    frequency_metrics,
    mentions,
    rank_correlation,
    thirds,
)
from pipeline.evals.text_spotting import TextSpotting
from pipeline.evals.zero_shot import ZeroShot
from pipeline.shards import Record, write_manifest, write_shard
from tests.evals.on_sphere import OnSphere

NAMES = ["cat", "red cat", "emu", "O’Neil's owl", "!!!", "cat cat"]
CAPTIONS = [
    "Cat",
    "a red CAT, sitting",
    "red: cat",
    "catalogue",
    "cat cat cat",
    "an emu",
    "o’neil's owl",
    "",
    "red and cat",
]


def test_mentions_by_hand():
    assert mentions(NAMES, CAPTIONS) == [5, 2, 1, 1, 0, 1]


def test_mentions_against_a_regular_expression():
    draw = random.Random(0)
    words = ["a", "b", "c", "d"]
    names = ["a", "b a", "a b c", "d d", "c-d", "e"]
    captions = [" ".join(draw.choices(words, k=draw.randint(0, 7))) for _ in range(300)]
    patterns = [re.compile(r"\b" + r"\W+".join(re.findall(r"\w", n)) + r"\b") for n in names]
    expected = [sum(bool(p.search(caption)) for caption in captions) for p in patterns]
    assert mentions(names, captions) == expected
    assert expected[-1] == 0 < expected[2]


def slow_ranks(values):
    """1-based; equal values share the mean of the places they take."""
    values = [round(value, 9) for value in values]
    ordered = sorted(values)
    return [
        sum(place for place, other in enumerate(ordered, 1) if other == value)
        / ordered.count(value)
        for value in values
    ]


def slow_correlation(first, second):
    a, b = slow_ranks(first), slow_ranks(second)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    norm = (sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b)) ** 0.5
    return cov / norm if norm else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_brute_force(seed):
    draw = random.Random(seed)
    counts = [draw.choice([0, 1, 1, 2, 3, 5, 9, 40]) for _ in range(41)]
    labels = [draw.randrange(38) for _ in range(90)]  # classes 38 to 40 have no image
    places = [draw.choice([0, 0, 2, 4, 5, 30]) for _ in labels]
    found = frequency_metrics(torch.tensor(places), torch.tensor(labels), torch.tensor(counts))
    classes = sorted(set(labels))
    ascending = sorted(counts[c] for c in classes)
    # the smallest counts that at least a third, and at least two thirds, do not exceed
    lower, upper = (
        next(t for t in ascending if 3 * sum(c <= t for c in ascending) >= part * len(classes))
        for part in (1, 2)
    )
    values = {
        "top1": lambda place: float(place == 0),
        "top5": lambda place: float(place < 5),
        "percentile": lambda place: 1 - place / 40,
    }
    expected = {"tail_max_count": lower}
    per_class = {}
    for name, value in values.items():
        per_class[name] = []
        for c in classes:
            own = [value(p) for p, label in zip(places, labels, strict=True) if label == c]
            per_class[name].append(sum(own) / len(own))
    for group, inside in (
        ("tail", lambda n: n <= lower),
        ("middle", lambda n: lower < n <= upper),
        ("head", lambda n: n > upper),
    ):
        members = [i for i, c in enumerate(classes) if inside(counts[c])]
        expected[f"{group}_classes"] = len(members)
        for name in values:
            expected[f"{group}_{name}"] = sum(per_class[name][i] for i in members) / len(members)
    expected["head_min_count"] = min(n for n in ascending if n > upper)
    for name in ("top5", "percentile"):
        expected[f"correlation_{name}"] = slow_correlation(
            [counts[c] for c in classes], per_class[name]
        )
    assert found == pytest.approx(expected)


def test_rank_correlation():
    up = torch.tensor([1, 5, 7, 100])
    assert rank_correlation(up, up**3) == pytest.approx(1.0)
    assert rank_correlation(up, -up) == pytest.approx(-1.0)
    assert rank_correlation(up, torch.ones(4)) == 0.0
    same = torch.tensor([0.3, 0.1 + 0.2, 0.5], dtype=torch.float64)  # the first two differ by 6e-17
    assert rank_correlation(up[:3], same) == pytest.approx(slow_correlation([1, 5, 7], [1, 1, 2]))


def test_thirds_of_few():
    assert thirds(torch.tensor([3, 1, 2])) == (1, 2)
    assert thirds(torch.tensor([4, 3, 2, 1])) == (2, 3)


def test_counts_that_do_not_differ():
    labels = torch.arange(4)
    with pytest.raises(
        ValueError, match="counts of 4 classes cannot be cut in three: .* at most 2"
    ):
        frequency_metrics(labels, labels, torch.tensor([2, 2, 2, 2]))


def write_set(folder):
    """Image i of class i; the names are CLASSES."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    (folder / "test" / "nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(len(CLASSES)):
            for suffix, content in (("png", b"%d" % number), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"s{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder)


CLASSES = [f"kind{n}" for n in range(9)]


class Forgetful(OnSphere):
    """Knows the classes from `least` on, and takes any other image for the last class."""

    def __init__(self, least):
        self.least = least

    def text_embed(self, captions, *, batch_size=256):
        return torch.eye(len(CLASSES))[[CLASSES.index(caption) for caption in captions]]

    def image_embed(self, images, *, batch_size=256):
        seen = [int(image) if int(image) >= self.least else 8 for image in images]
        return torch.eye(len(CLASSES))[seen]


def test_a_model_that_knows_the_frequent_classes_only(tmp_path):
    # class n is mentioned in n captions of two shards
    said = [CLASSES[n] for n in range(9) for _ in range(n)]
    halves = [said[::2], said[1::2]]
    shards = []
    for number, half in enumerate(halves):
        records = [
            Record(f"{number}-{n}", b"", "png", f"One {caption.upper()}!")
            for n, caption in enumerate(half)
        ]
        shards.append(write_shard(tmp_path / "raw", f"shard-{number:06d}", records))
    write_manifest(tmp_path / "raw", {"shards": shards, "steps": []})
    data = write_set(tmp_path / "set")
    (tmp_path / "counts.json").write_text(json.dumps({c: n for n, c in enumerate(CLASSES)}))
    for counts, batch_size in (("raw", 256), ("counts.json", 2)):
        task = ByFrequency(data=data, counts=str(tmp_path / counts), batch_size=batch_size)
        found = task.run(Forgetful(3))
        assert [found[f"{g}_top1"] for g in ("tail", "middle", "head")] == [0.0, 1.0, 1.0]
        assert found["tail_max_count"] == 2
        assert found["head_min_count"] == 6
        assert found["correlation_percentile"] > 0.5
        overall = ZeroShot(data=data).run(Forgetful(3))["top1"]
        groups = [found[f"{g}_top1"] * found[f"{g}_classes"] for g in ("tail", "middle", "head")]
        assert sum(groups) / 9 == pytest.approx(overall)


def test_what_is_wrong_with_counts(tmp_path):
    path = tmp_path / "counts.json"
    with pytest.raises(ValueError, match="need a shards directory, or a JSON"):
        class_counts(path, ["a"])
    path.write_text('{"a": 1, "b": "many"}')
    with pytest.raises(ValueError, match=r"no whole number for 2 classes, as \['b', 'c'\]"):
        class_counts(path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        class_counts(Path(tmp_path), ["a"])


@pytest.mark.parametrize(
    ("choice", "tasks"),
    [
        ("text_spotting", {"text_spotting"}),
        ("by_frequency", {"by_frequency"}),
        ("earns_its_place", {"zero_shot", "retrieval", "by_frequency", "text_spotting"}),
        ("[emoji,text_spotting]", {"zero_shot", "retrieval", "text_spotting"}),
    ],
)
def test_the_commands_config(choice, tasks):
    cfg = composed("evaluate", [f"eval={choice}", "run=runs/x"])
    assert set(cfg.eval) == tasks
    if "by_frequency" in tasks:
        with pytest.raises(ValueError, match=r"eval\.by_frequency\.counts=\.\.\."):
            check(cfg)
        OmegaConf.update(cfg, "eval.by_frequency.counts", "raw")
    check(cfg)
    if "text_spotting" in tasks:
        assert cfg.eval.text_spotting._target_.endswith(TextSpotting.__name__)
