"""Dataset -> checkpoint -> evaluation in W&B, read back from the files of offline runs."""

import json
import subprocess
import sys
import time
from hashlib import sha256
from types import SimpleNamespace

import pytest
import wandb

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
    which = sha256(b"trained\nretrieval").hexdigest()[:8]
    evaluation = f"evaluation-{which}-n-step-00000003"
    wait_for(lambda: evaluation in artifacts(offline, tmp_path)[1])
    found, numbers = artifacts(offline, tmp_path)
    dataset, checkpoint = dataset_artifact(data / "shards"), "checkpoint-n"
    assert found["n"].keys() == {(dataset.name, True), (checkpoint, False)}
    assert found["n"][dataset.name, True] == dataset.digest
    # the evaluation used what the training made
    assert found[evaluation] == {(checkpoint, True): found["n"][checkpoint, False]}
    assert "eval/retrieval/image_to_text_r_at_1" in numbers[evaluation]


def test_another_evaluation_is_another_wandb_run(monkeypatch, tmp_path):
    started = []

    class Run:
        settings = SimpleNamespace(_offline=False)
        summary = {}  # noqa: RUF012
        use_artifact = log_artifact = __exit__ = lambda *_, **__: None

        def __init__(self, **given):
            started.append(given)

        def __enter__(self):
            return self

    monkeypatch.setattr(wandb, "init", Run)
    checkpoint = tmp_path / "step-3.ckpt"
    checkpoint.write_bytes(b"")
    for tasks in (["retrieval"], ["zero_shot"], ["zero_shot", "retrieval"]):
        for weights in ("trained", "ema"):
            numbers = {f"eval/{task}/top1": 0.5 for task in tasks}
            WandbEvaluation().log(tmp_path, checkpoint, numbers, weights=weights)
    assert len({run["id"] for run in started}) == 6
    again = {"eval/retrieval/top1": 0.5, "eval/zero_shot/top5": 0.5}  # in another order
    WandbEvaluation().log(tmp_path, checkpoint, again, weights="ema")
    assert started[-1]["id"] == started[-2]["id"]
    assert started[-1]["config"]["weights"] == "ema"
    assert started[-1]["config"]["tasks"] == ["retrieval", "zero_shot"]


def test_online_it_is_wandbs_own_call():
    calls = []
    run = SimpleNamespace(settings=SimpleNamespace(_offline=False), use_artifact=calls.append)
    used(run, "artifact")
    assert calls == ["artifact"]


def test_a_dataset_is_called_after_its_pool_and_its_folder(data, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    manifest = json.loads((data / "shards" / "manifest.json").read_text())
    for pool in ("pictures", "my scans"):
        (shards / "manifest.json").write_text(json.dumps(manifest | {"pool": pool}))
        assert dataset_artifact(shards).name == f"dataset-{pool.replace(' ', '-')}-shards"
    assert dataset_artifact(data / "shards").name == "dataset-shards"  # a manifest without a pool


def test_names_are_those_that_wandb_takes():
    assert artifact_name("dataset", "a b/ü c") == "dataset-a-b---c"
    with pytest.raises(ValueError, match=r"track\.mode=of: modes are offline, online"):
        WandbEvaluation(mode="of")
