"""Zero-shot and retrieval numbers: ours, and CLIP_benchmark's own on the exported model."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from pipeline.evals.retrieval import Retrieval
from pipeline.evals.zero_shot import ZeroShot
from pipeline.formats.open_clip import OpenClip
from tests.peer.test_open_clip import PYTHON, make, pool_captions, pytestmark  # noqa: F401

NAMES = ["red panda", "violin", "snail", "otter", "volcano", "umbrella", "tulip"]
TEMPLATES = ["{c}", "a photo of a {c}.", "a drawing of the small {c}"]


def write_set(folder, images, texts, suffix):
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("2")
    for shard in (0, 1):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard * 40, min((shard + 1) * 40, len(images))):
                for ending, data in (("png", images[number]), (suffix, texts[number].encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def both(tmp_path_factory, make_picture):
    """(our numbers, theirs) of one model of random weights and 77 pictures."""
    folder = tmp_path_factory.mktemp("sets")
    trained = make("clip", "gelu")
    OpenClip().write(trained, folder / "exported")
    images = [make_picture(number, side=24) for number in range(77)]
    labels = [number * number % len(NAMES) for number in range(77)]
    words = list(dict.fromkeys(pool_captions(1000)))
    captions = [words[3 * n : 3 * n + 1 + n % 3] for n in range(77)]  # one to three an image
    write_set(folder / "labelled", images, list(map(str, labels)), "cls")
    (folder / "labelled" / "classnames.txt").write_text("\n".join(NAMES))
    prompts = folder / "labelled" / "zeroshot_classification_templates.txt"
    prompts.write_text("\n".join(TEMPLATES))
    write_set(folder / "captioned", images, ["\n".join(lines) for lines in captions], "txt")
    ours = ZeroShot(data=str(folder / "labelled"), batch_size=10).run(trained)
    ours |= Retrieval(data=str(folder / "captioned"), batch_size=10).run(trained)
    given = {"images": images, "labels": labels, "captions": captions}
    torch.save({**given, "class_names": NAMES, "templates": TEMPLATES}, folder / "inputs.pt")
    program = Path(__file__).with_name("clip_benchmark_numbers.py")
    done = subprocess.run(
        [PYTHON, program, folder / "exported", folder / "inputs.pt", folder / "theirs.json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ours, json.loads((folder / "theirs.json").read_text())


SAME = {
    "top1": "acc1",
    "top5": "acc5",
    "mean_per_class_recall": "mean_per_class_recall",
    **{f"text_to_image_r_at_{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)},
    **{f"image_to_text_r_at_{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
}


def test_the_numbers_are_clip_benchmarks(both):
    ours, theirs = both
    assert set(SAME) == set(ours) and set(SAME.values()) <= set(theirs)
    for name, other in SAME.items():
        assert ours[name] == pytest.approx(theirs[other], abs=1e-4), name
    assert 0 < ours["top1"] < 1 and 0 < ours["image_to_text_r_at_10"] < 1
