"""Dataset -> checkpoint -> evaluation in W&B, read back from the files of offline runs."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from pipeline.tracking.lineage import WandbEvaluation, artifact_name, dataset_artifact, used


def artifacts(offline, folder):
    """{run id: {(name, is used): digest}} of all offline runs below a folder, and their numbers."""
    found, numbers = {}, {}
    for path in folder.rglob("run-*.wandb"):
        run = path.stem.removeprefix("run-")
        for record in offline.records(path):
            kind = record.WhichOneof("record_type")
            if kind == "artifact":
                artifact = record.artifact
                key = artifact.name, artifact.use_after_commit
                found.setdefault(run, {})[key] = artifact.digest
            if kind == "summary":
                numbers.setdefault(run, set()).update(i.key for i in record.summary.update)
    return found, numbers


def wait_for(condition):
    until = time.monotonic() + 30  # W&B's own process writes a file a little later
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)
    assert condition()


def test_a_dataset_its_checkpoint_and_its_evaluation_are_one_line(
    data, tmp_path, root, train, environment, offline
):
    train(data, tmp_path, "n", "samples_seen=96", "tracking=default")
    command = [sys.executable, "-m", "pipeline.evaluate", f"run={tmp_path}/n", "eval=retrieval"]
    words = [f"eval.retrieval.data={data}/shards", "track=evaluation"]
    subprocess.run([*command, *words], cwd=root, env=environment(), check=True, capture_output=True)
    evaluation = "evaluation-n-step-00000003"
    wait_for(lambda: evaluation in artifacts(offline, tmp_path)[1])
    found, numbers = artifacts(offline, tmp_path)
    dataset, checkpoint = dataset_artifact(data / "shards"), "checkpoint-n"
    assert found["n"].keys() == {(dataset.name, True), (checkpoint, False)}
    assert found["n"][dataset.name, True] == dataset.digest
    # the evaluation used what the training made
    assert found[evaluation] == {(checkpoint, True): found["n"][checkpoint, False]}
    assert "eval/retrieval/image_to_text_r_at_1" in numbers[evaluation]


def test_online_it_is_wandbs_own_call():
    calls = []
    run = SimpleNamespace(settings=SimpleNamespace(_offline=False), use_artifact=calls.append)
    used(run, "artifact")
    assert calls == ["artifact"]


def test_names_are_those_that_wandb_takes():
    assert artifact_name("dataset", "a b/ü c") == "dataset-a-b---c"
    with pytest.raises(ValueError, match=r"track\.mode=of: modes are offline, online"):
        WandbEvaluation(mode="of")
