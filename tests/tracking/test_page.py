"""The page of a real run, and of runs that are empty, torn or gone."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf

from pipeline.tracking.dashboards import report, workspace
from pipeline.tracking.metrics import read_metrics
from pipeline.tracking.page import curve, page, read_rows, write_page
from pipeline.tracking.panels import SECTIONS

KEYS = {
    *("train/loss", "train/logit_scale", "train/grad_norm", "train/lr", "train/skipped_steps"),
    *("perf/pairs_per_second", "perf/data_wait_fraction", "perf/peak_memory_gib", "perf/mfu"),
    *("perf/tokens_per_image", "samples_seen"),
}
PANELS = [panel for section in SECTIONS for panel in section.panels]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, train):
    """A tiny run with W&B offline, in two lives, and a result."""
    runs = tmp_path_factory.mktemp("runs")
    knobs = ("tracking=default", "callbacks.utilisation.peak_flops=1e11")
    train(data, runs, "page", *knobs)
    (runs / "page" / "eval").mkdir()
    found = {"metrics": {"eval/zero_shot/top1": 0.25}, "checkpoint": "c"}
    found["intervals"] = {"eval/zero_shot/top1": [0.2, 0.3]}
    (runs / "page" / "eval" / "zero_shot.json").write_text(json.dumps(found))
    return runs / "page"


class Texts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_of_a_run_shows_its_sections(run):
    text = (run / "report.html").read_text()  # written at the end of training
    assert Texts(text).tags.count("svg") >= 2
    found = Texts(page(run))
    for words in (
        "Training",
        "Performance",
        "Data",
        "Results of the last evaluation",
        "The recipe",
    ):
        assert words in found.texts, words
    for words in ("loss", "pairs per second", "share of the device's peak", "ingest", "0.2500"):
        assert words in found.texts, words
    assert "0.2000 to 0.3000" in found.texts
    assert not re.search(r"(src|href)=['\"]?https?:", page(run))


def test_the_rows_have_the_keys_of_the_dashboard(run):
    rows = read_metrics(run)
    assert set(rows[-1]) >= KEYS
    assert all(0 < row["perf/mfu"] < 1 for row in rows)
    shown = {key for key in rows[-1] if any(panel.matches(key) for panel in PANELS)}
    assert set(rows[-1]) - shown == {"samples_seen", "step"}


def test_wandbs_file_has_the_same_rows_and_the_config(run, offline):
    (path,) = run.rglob("run-page.wandb")
    rows, config = offline(path)
    assert set(rows[-1]) >= KEYS
    losses = [row["train/loss"] for row in read_metrics(run)]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(losses)
    assert config["global_batch_size"] == 32
    assert config["optimizer"]["_target_"].startswith("pipeline.optim")


def test_a_page_of_little(tmp_path):
    with pytest.raises(ValueError, match=r"config.yaml is missing: give run="):
        write_page(tmp_path)
    OmegaConf.save({"name": "a<b", "data": {"shards": "gone"}}, tmp_path / "config.yaml")
    text = page(tmp_path)
    assert "no metrics yet" in text and "a&lt;b" in text and "gone is not here any more" in text
    good = json.dumps({"step": 1, "samples_seen": 32, "train/loss": 2.0, "train/lr": None})
    (tmp_path / "metrics.jsonl").write_text(f'{good}\n7\n{{"step": 2, "train/l')
    (tmp_path / "alerts.jsonl").write_text('{"samples_seen": 32, "title": "<b>", "text": "x"}\n')
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "torn.json").write_text('{"metr')
    found = {"metrics": {"eval/retrieval/top1": 0.5}, "weights": "ema"}
    (tmp_path / "eval" / "retrieval.ema.json").write_text(json.dumps(found))
    text = page(tmp_path)
    assert "retrieval, ema weights" in text
    assert "Training" in text and "&lt;b&gt;" in text and "cannot be read" in text
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_a_long_curve_is_drawn_by_means():
    rows = [{"samples_seen": n, "x": float(n % 2)} for n in range(30_000)]
    at, values = curve(rows, "x")
    assert len(at) == 1500
    assert values == pytest.approx(0.5)


def test_the_command(run, root, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    (tmp_path / "run" / "report.html").unlink()
    words = [sys.executable, "-m", "pipeline.report", f"run={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").exists()


def test_wandb_gets_the_same_panels():
    made = workspace(entity="someone", project="p")
    assert [section.name for section in made.sections] == [s.title for s in SECTIONS]
    plots = [plot for section in made.sections for plot in section.panels]
    assert len(plots) == len(PANELS)
    for plot, panel in zip(plots, PANELS, strict=True):
        assert str(plot.x) == "samples_seen" or plot.x.name == "samples_seen"
        for key in KEYS:
            named = key in [getattr(y, "name", y) for y in plot.y]
            matched = plot.metric_regex is not None and re.fullmatch(plot.metric_regex, key)
            assert bool(named or matched) == panel.matches(key), (panel, key)
    assert len(report(entity="someone", project="p", runs=["a"]).blocks) == 1 + 2 * len(SECTIONS)
