"""Each recipe trains with debug=tiny: twenty steps over its phases, on a laptop."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.check import composed
from pipeline.config import CONF, check
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.run import train

RECIPES = sorted(path.stem for path in Path(CONF, "recipe").glob("*.yaml"))


def words(recipe, data, runs):
    return [
        f"recipe={recipe}",
        "debug=tiny",
        f"name={recipe}",
        f"runs_dir={runs}",
        f"data.shards={data}/shards",
        f"tokenizer.path={data}/tokenizer",
    ]


def losses(run, steps):
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(0 < row["train/loss"] < 30 for row in rows)
    return [row["train/loss"] for row in rows]


# three phases and words chosen by syntax; a frozen tower; the sigmoid loss; LAMB
@pytest.mark.parametrize(
    "recipe", ["clipa_v2_h14", "chinese_clip_b16", "siglip_b16", "eva_clip_18b"]
)
def test_a_step_of_each_phase(recipe, data, tmp_path):
    cfg = composed("train", words(recipe, data, tmp_path))
    steps = len(cfg.phases) or 1
    cfg.samples_seen = cfg.every_phase.samples_seen = 32 * steps
    cfg.schedule.warmup_samples = cfg.every_phase.schedule.warmup_samples = 0
    check(cfg)
    losses(train(cfg), steps)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_from_the_command_line(recipe, data, tmp_path, root, environment):
    command = [sys.executable, "-m", "pipeline.train", *words(recipe, data, tmp_path)]
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses(tmp_path / recipe, 20)
