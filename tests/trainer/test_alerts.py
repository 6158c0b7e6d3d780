"""What the alerts see in rows of metrics, through the callback as the trainer calls it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from pipeline.tracking.page import read_rows
from pipeline.trainer.callbacks.alerts import Alerts


def row(number, **changed):
    usual = {
        "train/loss": 3.0 + 0.01 * math.sin(number),
        "train/skipped_steps": 0,
        "train/logit_scale": 14.0,
        "perf/pairs_per_second": 1000.0 + number % 3,
        "samples_seen": 32.0 * number,
    }
    return usual | changed


@pytest.fixture
def watch(tmp_path):
    """watch(rows) -> titles of the alerts, in order, as they stand in alerts.jsonl."""

    def see(rows, **knobs):
        callback = Alerts(**{"window": 10, **knobs})
        scale = torch.nn.Parameter(torch.tensor(0.0))
        model = SimpleNamespace(bounds=lambda: [(scale, 0.0, math.log(100))])
        trainer = SimpleNamespace(
            is_global_zero=True, default_root_dir=str(tmp_path), loggers=[], global_step=0
        )
        for one in rows:
            module = SimpleNamespace(model=model, last_logged=one)
            for _ in range(2):  # a row is logged every some steps only
                callback.on_train_batch_end(trainer, module, None, None, 0)
        return [one["title"] for one in read_rows(tmp_path / "alerts.jsonl")]

    return see


def test_a_quiet_run_is_quiet(watch):
    assert watch([row(n) for n in range(40)]) == []


@pytest.mark.parametrize(
    ("changed", "title"),
    [
        ({"train/loss": 4.0}, "loss spike"),
        ({"train/loss": math.nan}, "loss is not finite"),
        ({"train/skipped_steps": 2}, "steps skipped"),
        ({"perf/pairs_per_second": 700.0}, "slow"),
        ({"train/logit_scale": 100.0}, "logit scale at its bound"),
    ],
)
def test_what_is_unusual_is_said_once(watch, tmp_path, changed, title):
    rows = [row(n) for n in range(20)] + [row(20, **changed), row(21)]
    assert watch(rows) == [title]
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert json.loads(line)["samples_seen"] == 640


def test_what_lasts_is_said_again_after_a_window(watch):
    rows = [row(n) for n in range(10)] + [
        row(n, **{"train/logit_scale": 100.0}) for n in range(10, 35)
    ]
    assert watch(rows) == ["logit scale at its bound"] * 3


def test_a_small_drop_and_the_first_rows_say_nothing(watch):
    rows = [row(0, **{"train/loss": 9.0}), row(1, **{"train/loss": 3.0})]
    rows += [row(n) for n in range(2, 20)] + [row(20, **{"perf/pairs_per_second": 850.0})]
    assert watch(rows) == []


def test_wrong_knobs_are_named():
    with pytest.raises(ValueError, match=r"window=2 \(at least 4\)"):
        Alerts(window=2)
