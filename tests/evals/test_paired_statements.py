"""Two pictures, two statements."""

import json

import pytest
import torch

from pipeline.evals.paired_statements import PairedStatements, pair_accuracy
from tests.evals.on_sphere import OnSphere


class Reading(OnSphere):
    """A picture is its statement; `fooled` ones look like a cat."""

    def __init__(self, fooled=()):
        self.fooled = fooled

    def image_embed(self, images, *, batch_size=256):
        return self._of(["cat" if i.decode() in self.fooled else i.decode() for i in images])

    def text_embed(self, captions, *, batch_size=256):
        return self._of([caption.removeprefix("a photo of ") for caption in captions])

    def _of(self, words):
        return torch.eye(4)[[("cat", "dog", "left", "right").index(word) for word in words]]


@pytest.fixture
def data(tmp_path):
    rows = []
    for pair, pattern in ((("cat", "dog"), "kind"), (("left", "right"), "place")):
        for word in pair:
            (tmp_path / f"{word}.jpg").write_bytes(word.encode())
        names = [f"{word}.jpg" for word in pair]
        rows.append({"images": names, "statements": pair, "pattern": pattern})
    (tmp_path / "statements.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_both_pictures_must_be_right(data):
    assert set(PairedStatements(data=str(data)).run(Reading()).values()) == {1.0}
    found = PairedStatements(data=str(data), batch_size=1).run(Reading(fooled=("dog",)))
    assert found == {"accuracy": 0.5, "kind_accuracy": 0.0, "place_accuracy": 1.0}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1"),
        ('{"images": ["cat.jpg"], "statements": ["a", "b"]}', "line 1"),
        ('{"images": ["cat.jpg", "no.jpg"], "statements": ["a", "b"]}', "no.jpg"),
        ('{"images": ["cat.jpg", "../x.jpg"], "statements": ["a", "b"]}', "outside"),
        ('{"images": ["cat.jpg", "dog.jpg"]}', "statements"),
    ],
)
def test_a_line_that_does_not_fit_is_named(line, words, data):
    (data / "statements.jsonl").write_text(line)
    with pytest.raises(ValueError, match=words):
        PairedStatements(data=str(data)).run(Reading())


def test_what_is_missing_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="no {s} for the statement"):
        PairedStatements(data=str(data), prompt="a photo")
    (data / "statements.jsonl").write_text("")
    with pytest.raises(ValueError, match="no pairs"):
        PairedStatements(data=str(data)).run(Reading())
    with pytest.raises(ValueError, match="a line a pair"):
        PairedStatements(data=str(tmp_path / "elsewhere")).run(Reading())


def test_pairs_of_statements():
    oracle = torch.eye(2).expand(5, 2, 2)
    assert pair_accuracy(oracle).all()
    assert not pair_accuracy(torch.zeros(3, 2, 2)).any()
    # one of the two statements goes to the wrong image
    assert not pair_accuracy(torch.tensor([[[1.0, 0.9], [0.5, 0.2]]])).any()
    generator = torch.Generator().manual_seed(0)
    share = pair_accuracy(torch.rand(40_000, 2, 2, generator=generator)).double().mean()
    assert float(share) == pytest.approx(0.25, abs=0.01)
