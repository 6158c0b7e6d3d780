"""explain, plan, the data card, and the dataset in W&B: as a user types them."""

import json
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from curation.run import run
from pipeline.check import composed
from pipeline.shards import read_manifest
from pipeline.tracking.lineage import dataset_artifact

STEPS = (
    "+annotate@annotate.hashes=hashes",
    "+select@select.caption_frequency=caption_frequency",
    "+select@select.duplicates=duplicates",
    "select.caption_frequency.max_pairs_per_caption=1",
    "order=[caption_frequency,duplicates]",
)


def curate(pool, out, *overrides):
    given = ["engine.workers=1", f"pool={pool}", f"out={out}", *STEPS, *overrides]
    return run(composed("curate", given))


@pytest.fixture
def dirty(parquet_pool):
    """Twelve pairs; pairs 1 and 2 share a caption, pair 3 has none."""
    pool = parquet_pool(12, files=1)
    path = pool / "part-0.parquet"
    table = pq.read_table(path)
    captions = table["caption"].to_pylist()
    captions[1] = captions[2] = "free download"
    captions[3] = ""
    column = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(column, "caption", [captions]), path)
    return pool


def uid_of(selection, reason):
    rows = selection.rejected().to_pylist()
    return next(row["uid"] for row in rows if row["reason"] == reason)


def test_explain_says_why(dirty, tmp_path, capsys):
    selection = curate(dirty, tmp_path / "out")
    kept = selection.plan(["uid"])["uid"][0].as_py()
    dropped = uid_of(selection, "frequent_caption")
    for uid, words in {
        kept: ("in the shards", "caption_frequency", "duplicates", "pixel_hash"),
        dropped: ("dropped: frequent_caption", "free download", "max_pairs_per_caption=1"),
        "part-0.parquet:3": ("dropped: missing_caption",),
    }.items():
        capsys.readouterr()
        curate(dirty, tmp_path / "out", "action=explain", f"uid='{uid}'")
        text = "".join(capsys.readouterr().err.split("│"))
        squeezed = "".join(text.split())
        assert all("".join(word.split()) in squeezed for word in words), text
    with pytest.raises(ValueError, match="no such pair"):
        curate(dirty, tmp_path / "out", "action=explain", "uid=nonsense")
    with pytest.raises(ValueError, match="explain needs uid"):
        curate(dirty, tmp_path / "out", "action=explain")
    with pytest.raises(ValueError, match="actions are run, explain, plan"):
        curate(dirty, tmp_path / "out", "action=explian")


def test_explain_is_a_word_of_the_command(root, dirty, tmp_path):
    selection = curate(dirty, tmp_path / "out")
    words = [f"pool={dirty}", f"out={tmp_path}/out", "engine.workers=1", *STEPS]
    command = [sys.executable, "-m", "curation.run", "explain", *words]
    uid = uid_of(selection, "frequent_caption")
    done = subprocess.run([*command, f"uid='{uid}'"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "frequent_caption" in done.stderr, done.stderr


def test_plan_predicts_from_a_sample(dirty, tmp_path, capsys):
    curate(dirty, tmp_path / "out", "action=plan", "sample=4", "nodes=3", "engine.workers=2")
    text = capsys.readouterr().err
    assert "12 pairs, 3 node(s) x 2 workers" in text
    assert "hashes" in text and "GPU hours" in text
    assert not (tmp_path / "out").exists()


def test_the_card_counts_before_and_after(dirty, tmp_path):
    curate(dirty, tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    manifest = read_manifest(tmp_path / "out")
    assert (card["read"], card["kept"]) == (12, manifest["num_samples"])
    assert sum(c["kept"] for c in card["source"].values()) == manifest["num_samples"]
    assert sum(c["pool"] for c in card["source"].values()) == 11  # one never became a row
    assert card["dropped"]["caption_frequency"] == {"frequent_caption": 2}
    assert "What is in it" in (tmp_path / "out" / "report.html").read_text()


def test_the_dataset_is_logged_to_wandb(dirty, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    curate(dirty, tmp_path / "out", "track=wandb")
    # the artifact that a training run on these shards says it uses
    dataset = dataset_artifact(tmp_path / "out")
    names = (dataset.name, dataset.digest, "curation/steps", "frequent_caption", "curation/report")
    wanted = [name.encode() for name in names]
    until = time.monotonic() + 30  # W&B's own process writes the file a little later
    content = b""
    while not all(word in content for word in wanted) and time.monotonic() < until:
        time.sleep(0.1)
        written = list((tmp_path / "out.wandb").rglob("run-*.wandb"))
        content = b"".join(path.read_bytes() for path in written)
    assert len(written) == 1
    assert all(word in content for word in wanted)
