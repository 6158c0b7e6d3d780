"""A run directory becomes an embedder."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from pipeline.check import composed
from pipeline.evals.trained import TrainedClip, newest_checkpoint
from pipeline.evaluate import evaluate, table


def pictures(count):
    images = []
    for n in range(count):
        sink = io.BytesIO()
        pixels = torch.randint(0, 256, (20 + n, 24, 3), generator=torch.Generator().manual_seed(n))
        Image.fromarray(pixels.byte().numpy()).save(sink, "PNG")
        images.append(sink.getvalue())
    return images


def test_embeddings_are_the_models_own(run):
    trained = TrainedClip.load(run)
    images, captions = pictures(5), ["a", "b c", "", "d" * 100, "é 猫"]
    pixels = torch.stack([trained.transform.evaluate(image) for image in images])
    with torch.no_grad():
        expected = (
            trained.model.encode_image(trained.transform.normalise(pixels)),
            trained.model.encode_text(trained.tokenizer(captions)),
        )
    for batch_size in (2, 5, 100):
        torch.testing.assert_close(trained.image_embed(images, batch_size=batch_size), expected[0])
        torch.testing.assert_close(trained.text_embed(captions, batch_size=batch_size), expected[1])
    torch.testing.assert_close(expected[0].norm(dim=1), torch.ones(5))
    assert not trained.model.training


def test_captions_that_training_shortens_are_truncated_in_evaluation(run):
    """text_tokens chooses among the words of a longer tokenizer; the tower holds the few."""
    long = ["one two three four five six seven eight nine ten eleven twelve thirteen fourteen"]
    expected = TrainedClip.load(run).text_embed(long)
    config = OmegaConf.load(run / "config.yaml")
    config.tokenizer.context_length = 30
    OmegaConf.save(config, run / "config.yaml")
    torch.testing.assert_close(TrainedClip.load(run).text_embed(long), expected)


def test_the_newest_checkpoint_is_loaded(run, save_checkpoint):
    trained = TrainedClip.load(run)
    torch.nn.init.zeros_(trained.model.text_projection.weight)
    save_checkpoint(trained.model, run / "checkpoints" / "step-9.ckpt")
    assert newest_checkpoint(run).name == "step-10.ckpt"
    assert TrainedClip.load(run).model.text_projection.weight.abs().sum() > 0
    save_checkpoint(trained.model, run / "checkpoints" / "step-100.ckpt")
    assert newest_checkpoint(run).name == "step-100.ckpt"
    assert TrainedClip.load(run).model.text_projection.weight.abs().sum() == 0
    save_checkpoint(trained.model, run / "checkpoints" / "last.ckpt")
    assert newest_checkpoint(run).name == "last.ckpt"
    old = TrainedClip.load(run, checkpoint=run / "checkpoints" / "step-10.ckpt")
    assert old.checkpoint.name == "step-10.ckpt"
    assert old.model.text_projection.weight.abs().sum() > 0


def test_what_is_missing_is_named(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(ValueError, match=r"config\.yaml is missing.*pipeline\.train"):
        TrainedClip.load(elsewhere)
    with pytest.raises(ValueError, match=r"checkpoint .*no\.ckpt is missing"):
        TrainedClip.load(run, checkpoint="no.ckpt")
    (run / "checkpoints" / "step-10.ckpt").unlink()
    with pytest.raises(ValueError, match=r"no \*\.ckpt in .*start it again"):
        TrainedClip.load(run)
    (elsewhere / "config.yaml").write_text("name: n\nmodel: {}\n")
    with pytest.raises(ValueError, match="has no tokenizer, transform"):
        TrainedClip.load(elsewhere)


def test_a_checkpoint_that_is_none_of_ours(run):
    path = run / "checkpoints" / "step-10.ckpt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        TrainedClip.load(run)
    torch.save({"state_dict": {"net.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"no weights named model\.\*"):
        TrainedClip.load(run)
    torch.save({"state_dict": {"model.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="does not fit"):
        TrainedClip.load(run)


def averaged(run):
    """Give the run's checkpoint a moving average, one weight of which is all ones."""
    path = run / "checkpoints" / "step-10.ckpt"
    content = torch.load(path, weights_only=True)
    average = {"text_projection.weight": torch.ones(12, 16)}
    content["callbacks"] = {"Ema": {"step": 1, "weights": average}}
    torch.save(content, path)


def test_the_moving_average_is_loaded_where_there_is_one(run):
    with pytest.raises(ValueError, match=r"holds no moving average: train with ema=constant"):
        TrainedClip.load(run, weights="ema")
    with pytest.raises(ValueError, match="weights=best: one of trained, ema"):
        TrainedClip.load(run, weights="best")
    averaged(run)
    trained, average = TrainedClip.load(run), TrainedClip.load(run, weights="ema")
    assert torch.equal(average.model.text_projection.weight, torch.ones(12, 16))
    assert not torch.equal(trained.model.text_projection.weight, torch.ones(12, 16))
    assert torch.equal(average.model.image.position, trained.model.image.position)


def test_numbers_of_the_moving_average_lie_beside_the_others(run, data, read_json):
    averaged(run)
    words = [f"run={run}", "eval=retrieval", f"eval.retrieval.data={data}/shards"]
    for weights in ("trained", "ema"):
        evaluate(composed("evaluate", [*words, f"weights={weights}", "accelerator=cpu"]))
    assert read_json(run / "eval" / "retrieval.json")["weights"] == "trained"
    assert read_json(run / "eval" / "retrieval.ema.json")["weights"] == "ema"


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(run, capsys):
    torch.save({"state_dict": Evil()}, run / "checkpoints" / "step-10.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        TrainedClip.load(run)
    assert "executed" not in capsys.readouterr().out


def test_a_broken_image_stops_with_its_hash(run):
    with pytest.raises(ValueError, match=r"sha256 .* \(4 bytes\) cannot be embedded: not_an_image"):
        TrainedClip.load(run).image_embed([*pictures(1), b"oops"])


def test_the_command_prints_and_writes(run, tmp_path_factory):
    """A subprocess in an empty folder: Hydra must leave no outputs/ and no log file behind."""
    folder = tmp_path_factory.mktemp("cwd")
    data = tmp_path_factory.mktemp("set")
    (data / "test").mkdir()
    (data / "classnames.txt").write_text("cat\ndog\n")
    (data / "zeroshot_classification_templates.txt").write_text("{c}\n")
    (data / "test" / "nshards.txt").write_text("1")
    with tarfile.open(data / "test" / "0.tar", "w") as tar:
        for n, image in enumerate(pictures(2)):
            for suffix, content in (("png", image), ("cls", str(n).encode())):
                info = tarfile.TarInfo(f"s{n}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    command = [sys.executable, "-m", "pipeline.evaluate", f"run={run}", "eval=emoji"]
    command += [f"eval.{task}.data={data}" for task in ("zero_shot", "retrieval")]
    (data / "srun").write_text("#!/bin/sh\n")  # a machine of a SLURM cluster, which Lightning says
    (data / "srun").chmod(0o755)
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": f"{data}:{os.environ['PATH']}"}
    env = os.environ | path
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean_per_class_recall" in done.stdout and "srun" not in done.stderr
    assert list(folder.iterdir()) == []
    written = json.loads((run / "eval" / "zero_shot.json").read_text())
    assert set(written["metrics"]) == {
        f"eval/zero_shot/{metric}" for metric in ("top1", "top5", "mean_per_class_recall")
    }
    for key, value in written["metrics"].items():
        low, high = written["intervals"][key]
        assert low <= value <= high
    assert "95 % interval" in done.stdout
    assert written["checkpoint"].endswith("step-10.ckpt")
    assert (run / "eval" / "retrieval.json").exists()


def test_the_table_has_a_row_a_metric():
    assert table({"eval/a/top1": 0.5, "eval/b/x/y": 1.0}, title="t").row_count == 2
