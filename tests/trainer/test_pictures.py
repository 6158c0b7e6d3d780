"""Pictures of a run while it goes on, which change nothing of it."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline.tracking.metrics import read_metrics
from pipeline.tracking.page import page
from pipeline.tracking.pictures import negatives_sheet, retrieval_sheet, seen_only
from pipeline.trainer.callbacks.pictures import Pictures
from pipeline.trainer.checkpoints import find_newest

WORDS = ["callbacks=[default,pictures]", "callbacks.pictures.every_samples=320"]


def weights(run):
    return torch.load(find_newest(run / "checkpoints"), weights_only=True)["state_dict"]


def losses(run):
    return [row["train/loss"] for row in read_metrics(run)]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_run_is_the_same_and_its_pictures_are_on_its_page(data, tmp_path, train, processes):
    knobs = [f"trainer.devices={processes}", "samples_seen=384"]
    knobs += ["trainer.strategy=ddp"] if processes > 1 else []
    # words longer than the tower are cut as in evaluation
    knobs += ["text_tokens=truncate", "tokenizer.context_length=24"]
    train(data, tmp_path, "plain", *knobs)
    train(data, tmp_path, "shown", *knobs, *WORDS)
    assert losses(tmp_path / "shown") == losses(tmp_path / "plain")
    one, other = weights(tmp_path / "shown"), weights(tmp_path / "plain")
    assert all(torch.equal(one[key], other[key]) for key in other)
    kinds = ("kept-patches", "nearest-negatives", "retrieval")
    found = sorted(path.name for path in (tmp_path / "shown" / "media").iterdir())
    assert found == [f"{seen:012d}-{kind}.png" for seen in (320, 384) for kind in kinds]
    for path in (tmp_path / "shown" / "media").iterdir():
        assert min(Image.open(path).size) > 100
    shown = page(tmp_path / "shown")
    assert "retrieval, after 384 pairs" in shown and "after 320 pairs" not in shown


def test_a_letter_that_the_font_lacks_warns_nobody(tmp_path, monkeypatch):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    sheet = retrieval_sheet(images, ["火", "ไฟ"], torch.eye(2))
    monkeypatch.setattr(Pictures, "due", lambda *_: True)
    monkeypatch.setattr(Pictures, "_sheets", lambda *_: {"retrieval": sheet})
    module = SimpleNamespace(phase=SimpleNamespace(samples_at=lambda step: step))
    trainer = SimpleNamespace(global_step=1, default_root_dir=tmp_path, loggers=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pictures(every_samples=1).on_train_batch_end(trainer, module, None, None, 0)
    assert (tmp_path / "media" / "000000000001-retrieval.png").is_file()


def test_patches_that_are_not_seen_are_pale():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    shown = seen_only(image, torch.tensor([0, 3]), 4)
    assert (shown[:, :4, :4] == 0).all() and (shown[:, 4:, 4:] == 0).all()
    assert (shown[:, :4, 4:] == 204).all() and (shown[:, 4:, :4] == 204).all()


def colours(figure):
    """The words of a sheet and their colours, in order."""
    return [
        (text.get_text(), text.get_color())
        for axis in figure.axes
        for text in axis.texts
        if text.get_text()
    ]


def test_the_sheets_say_what_is_right_and_what_is_near():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.6, 0.3], [0.0, 0.8, 0.7]])
    green, brown = "#1b7f4b", "#b3541e"
    found = colours(retrieval_sheet(images, ["a", "b", "c"], similarity, rows=1, best=1))
    assert found == [("0.90 b", brown), ("0.50 a (place 2)", green)]
    found = colours(negatives_sheet(images, ["a", "b", "c"], similarity, rows=2))
    assert found == [("0.50 a", green), ("0.90 b", brown), ("0.70 c", green), ("0.80 b", brown)]
    # the same caption is no negative
    found = colours(negatives_sheet(images, ["a", "a", "c"], similarity, rows=1))
    assert found == [("0.70 c", green), ("0.80 a", brown)]
    assert colours(negatives_sheet(images, ["a", "a", "a"], similarity)) == []


def test_what_is_wrong_is_named(data, tmp_path, train):
    with pytest.raises(ValueError, match=r"callbacks\.pictures\.every_samples=0"):
        Pictures(every_samples=0)
    with pytest.raises(ValueError, match=r"callbacks\.pictures\.pairs=1"):
        Pictures(every_samples=9, pairs=1)
    done = train(data, tmp_path, "x", "trainer=fsdp", "trainer.devices=1", *WORDS, code=2)
    assert "callbacks.pictures=null" in done.stderr
