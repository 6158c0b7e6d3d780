"""Training as a user types it: the command, and data for it."""

import os
import subprocess
import sys

import pytest

from pipeline.data.tokenizer import train_bpe
from pipeline.shards import Record, content_uid, write_manifest, write_shard


@pytest.fixture(scope="session")
def data(tmp_path_factory, make_picture):
    """A folder with `shards`, 80 pairs, and a `tokenizer` of 600 pieces."""
    folder = tmp_path_factory.mktemp("data")
    made = []
    for number in range(80):
        image, caption = make_picture(number), f"thing number {number}"
        uid = content_uid(image, caption)
        made.append(Record(uid, image, "png", caption, {"uid": uid}))
    entry = write_shard(folder / "shards", "shard-000000", made)
    step = {"name": "ingest", "read": 80, "kept": 80, "dropped": {}}
    write_manifest(folder / "shards", {"num_samples": 80, "shards": [entry], "steps": [step]})
    train_bpe((r.caption for r in made), vocab_size=600, directory=folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def command():
    """command(data, runs, name, *overrides): 20 steps of 32 pairs of a micro model."""
    return lambda data, runs, name, *overrides: [
        sys.executable,
        "-m",
        "pipeline.train",
        "recipe=emoji",
        "debug=tiny",
        f"name={name}",
        f"runs_dir={runs}",
        f"data.shards={data}/shards",
        f"tokenizer.path={data}/tokenizer",
        "model.text.vocab_size=600",
        *overrides,
    ]


@pytest.fixture(scope="session")
def environment():
    """environment(threads): of a training process."""
    return lambda threads=1: {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "WANDB_MODE": "offline",
    }


@pytest.fixture(scope="session")
def train(root, command, environment):
    """train(data, runs, name, *overrides, code) runs the command to its end."""

    def run(data, runs, name, *overrides, code=0):
        done = subprocess.run(
            command(data, runs, name, *overrides),
            cwd=root,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    return run
