"""What was embedded once is not embedded again, within a command and between commands."""

import json
import subprocess
import sys

import pytest
import torch

from pipeline.evals.feature_file import FeatureFile
from pipeline.evals.remembered import Remembered
from pipeline.evals.trained import TrainedClip, weights_hash


class Counted(TrainedClip):
    """Knows how many items it has embedded."""

    made = 0

    def _embed_images(self, images):
        self.made += len(images)
        return super()._embed_images(images)

    def _embed_captions(self, captions):
        self.made += len(captions)
        return super()._embed_captions(captions)


@pytest.fixture
def trained(run):
    return Counted.load(run, device="cpu")


@pytest.fixture
def pictures(make_picture):
    return [make_picture(n) for n in range(7)]


def test_rows_are_those_of_the_model_and_made_once(trained, pictures):
    remembered = Remembered(trained)
    expected = trained.image_embed([*pictures[:5], pictures[2]])
    trained.made = 0
    for _ in range(2):
        found = remembered.image_embed([*pictures[:5], pictures[2]])
        torch.testing.assert_close(found, expected)
    assert trained.made == 5
    torch.testing.assert_close(remembered.image_embed(pictures[::-1])[2:], found[:5].flip(0))
    assert trained.made == 7
    # a caption is no picture, and a projected row is no embedding
    torch.testing.assert_close(remembered.text_embed(["a", "b"]), trained.text_embed(["a", "b"]))
    projected = remembered.image_projected(pictures)
    torch.testing.assert_close(projected, trained.image_projected(pictures))
    assert remembered.image_embed([]).shape == remembered.image_features([]).shape[:1] + (12,)
    assert remembered.logit_scale == trained.logit_scale


def test_a_folder_hands_them_to_the_next_command(trained, pictures, tmp_path):
    first = Remembered(trained, directory=tmp_path / "f")
    expected = first.image_embed(pictures[:4])
    first.keep()
    first.keep()  # nothing new, nothing written
    second = Remembered(trained, directory=tmp_path / "f")
    trained.made = 0
    found = second.image_embed(pictures)
    assert trained.made == 3
    assert torch.equal(found[:4], expected)
    second.keep()
    features = FeatureFile(tmp_path / "f" / weights_hash(trained.model)[:16] / "image_embed")
    assert len(features.files) == 2
    assert features.made_by["model"] == weights_hash(trained.model)
    assert features.made_by["normalised"] is True
    uids, embeds = features.embeds("image_embed")
    assert len(set(uids)) == 7 and embeds.shape == (7, 12)


def test_other_weights_have_rows_of_their_own(trained, pictures, tmp_path):
    first = Remembered(trained, directory=tmp_path / "f")
    before = first.image_embed(pictures)
    first.keep()
    with torch.no_grad():
        trained.model.image_projection.weight.add_(torch.randn(12, 16))
    second = Remembered(trained, directory=tmp_path / "f")
    assert not torch.allclose(second.image_embed(pictures), before)


def test_a_damaged_file_is_named(trained, pictures, tmp_path):
    first = Remembered(trained, directory=tmp_path / "f")
    first.image_embed(pictures)
    first.keep()
    (file,) = (tmp_path / "f").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{file.name} does not say which model made it"):
        Remembered(trained, directory=tmp_path / "f").image_embed(pictures)


def test_the_command_gives_the_same_numbers_from_the_folder(root, tiny_run, tmp_path):
    found = []
    for number in range(2):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "pipeline.evaluate", f"run={tiny_run}", "eval=emoji"]
        words = [f"out={out}", f"features={tmp_path}/f", "accelerator=cpu"]
        subprocess.run([*command, *words], cwd=root, check=True, capture_output=True)
        files = sorted(out.glob("*.json"))
        found.append([json.loads(file.read_text())["metrics"] for file in files])
        kept = sorted((tmp_path / "f").rglob("*.parquet"))
        # 1,190 pictures and 1,190 prompts: retrieval of the same pairs adds nothing
        assert len(kept) == 2 and [
            len(FeatureFile(k.parent).embeds(k.parent.name)[0]) for k in kept
        ]
    assert found[0] == found[1]
