"""Two phases in one run: one line of checkpoints and pairs, tables resized once, kills."""

import os
import signal
import subprocess
import time

import pytest
import torch

from pipeline.evals.trained import TrainedClip, run_config
from pipeline.models.resize import resize_positions
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.checkpoints import find_newest

PHASES = [
    "every_phase=null",  # of debug=tiny: these have their own sizes
    "samples_seen=???",
    "checkpoint_every_steps=3",
    "keep_checkpoints=100",
    "micro_batch_size=10",
    "+phases.small.samples_seen=192",
    "+phases.small.schedule.warmup_samples=32",
    "+phases.small.model.image.image_size=16",
    "+phases.small.model.text.context_length=8",
    "+phases.small.frozen=[text.*]",
    "+phases.large.samples_seen=96",
    "+phases.large.global_batch_size=16",
    "+phases.large.schedule.warmup_samples=16",
    "+phases.large.image_tokens=null",
]


def saved(run, step):
    path = run / "checkpoints" / f"step-{step:08d}.ckpt"
    return torch.load(path, weights_only=True)


def rows(run):
    return [(r["step"], r["samples_seen"], r["train/loss"]) for r in read_metrics(run)]


@pytest.fixture(scope="module")
def whole(data, train, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    done = train(data, runs, "whole", *PHASES)
    assert "image.position resized, 17 -> 65 rows" in done.stderr
    assert "text.position resized, 8 -> 16 rows" in done.stderr
    return runs / "whole"


def test_steps_and_pairs_run_through(whole):
    found = rows(whole)
    assert [row[0] for row in found] == list(range(1, 13))
    assert [row[1] for row in found] == [32 * n for n in range(1, 7)] + [
        192 + 16 * n for n in range(1, 7)
    ]


def test_what_is_frozen_stays_and_learns_in_the_next_phase(whole):
    first, last, end = (saved(whole, step)["state_dict"] for step in (3, 6, 12))
    texts = [name for name in first if name.startswith("model.text.")]
    assert texts and all(torch.equal(first[name], last[name]) for name in texts)
    assert not torch.equal(
        last["model.text.token_embed.weight"], end["model.text.token_embed.weight"]
    )
    assert not torch.equal(
        first["model.image.patch_embed.weight"], last["model.image.patch_embed.weight"]
    )


def test_optimizer_state_is_kept_by_name_through_the_change(whole):
    """Moments of both phases: six steps and three, but for what was frozen or resized."""
    state = saved(whole, 9)["optimizer_states"][0]
    steps = {
        name: int(state["state"][index]["step"])
        for group in state["param_groups"]
        for name, index in zip(group["names"], group["params"], strict=True)
    }
    assert steps["model.image.patch_embed.weight"] == 9
    assert steps["model.image.position"] == steps["model.text.token_embed.weight"] == 3


def test_the_newest_checkpoint_is_read_with_its_phases_sizes(whole):
    trained = TrainedClip.load(whole)
    assert trained.model.image.image_size == trained.transform.image_size == 32
    first = whole / "checkpoints" / "step-00000003.ckpt"
    assert run_config(whole, first).transform.image_size == 16
    small = TrainedClip.load(whole, checkpoint=first)
    assert small.model.image.num_tokens == 16 and small.model.text.context_length == 8
    table = small.model.state_dict()
    grown, changes = resize_positions(table, trained.model)
    assert changes == {"image.position": (17, 65), "text.position": (8, 16)}
    assert torch.equal(grown["image.position"][0], table["image.position"][0])


@pytest.mark.parametrize("rows_before_the_kill", [5, 8])
def test_killed_in_either_phase_it_goes_on_bit_identically(
    root, data, whole, tmp_path, rows_before_the_kill, train, command, environment
):
    words = command(data, tmp_path, "killed", *PHASES)
    started = subprocess.Popen(
        words, cwd=root, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics, until = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < until and started.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= rows_before_the_kill:
            break
        time.sleep(0.001)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert find_newest(tmp_path / "killed" / "checkpoints").stem < "step-00000012"
    train(data, tmp_path, "killed", *PHASES)
    assert rows(tmp_path / "killed") == rows(whole)
    ours, theirs = (saved(run, 12)["state_dict"] for run in (tmp_path / "killed", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_go_through_both_phases(data, whole, tmp_path, train):
    train(data, tmp_path, "two", *PHASES, "trainer.devices=2", "micro_batch_size=3")
    for ours, theirs in zip(rows(tmp_path / "two"), rows(whole), strict=True):
        assert ours[:2] == theirs[:2] and abs(ours[2] - theirs[2]) < 2e-5


def test_a_changed_phase_under_an_old_name_is_refused(data, whole, train):
    changed = [*PHASES, "phases.large.samples_seen=112"]
    done = train(data, whole.parent, "whole", *changed, code=2)
    assert "phases.large.samples_seen: was 96, now 112" in done.stderr
    again = train(data, whole.parent, "whole", *PHASES, "+phases.large.micro_batch_size=2")
    assert "nothing to do" in again.stderr


def test_a_pattern_without_a_parameter_is_named(data, tmp_path, train):
    done = train(data, tmp_path, "bad", "frozen=[visual.*]", code=2)
    assert "no parameter is called 'visual.*'" in done.stderr
