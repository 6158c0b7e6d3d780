"""The words of a command: a mistake in them is one line and exit code 2, and --help answers."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

import curation.run
import pipeline.evaluate
import pipeline.export
import pipeline.train
from pipeline.command import entry, first_sentence

COMMANDS = {
    "clip-train": pipeline.train.main,
    "clip-eval": pipeline.evaluate.main,
    "clip-export": pipeline.export.main,
    "clip-curate": curation.run.command,
}


@pytest.fixture
def type_in(monkeypatch, capsys, tmp_path):
    """type_in(main, *words) -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)  # Hydra leaves a folder for the results of -m
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["command", *words])
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code
        assert "HYDRA_FULL_ERROR" not in os.environ
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("clip-train", "", "recipe: say which, recipe=NAME; known: aclip_b16_yfcc15m"),
        ("clip-train", "recipe=smal", "recipe=smal: no such recipe; did you mean small? known: "),
        (
            "clip-train",
            "recipe=small optimizer=adam",
            "optimizer=adam: no such optimizer; did you mean adamw? known: adafactor, adamw, lamb",
        ),
        (
            "clip-train",
            "recipe=small sample_seen=3",
            "sample_seen: unknown; did you mean samples_seen? known: name, runs_dir, seed",
        ),
        (
            "clip-train",
            "recipe=small optimizer.lrr=3",
            "optimizer.lrr: unknown; did you mean lr? known: lr, betas, eps",
        ),
        (
            "clip-train",
            "recipe=small trainer.precison=bf16",
            "trainer.precison: unknown; did you mean precision? known: accelerator",
        ),
        (
            "clip-train",
            "recipe=small trainer.benchmark=true",  # Lightning takes it, no YAML of ours has it
            "trainer.benchmark: not in the YAML of lightning.pytorch.Trainer: write "
            "+trainer.benchmark=",
        ),
        ("clip-train", "recipe=small loss.softmx.scale=3", "loss.softmx: unknown; did you mean"),
        ("clip-train", "recipe=small seed=abc", "seed: Value 'abc' of type 'str' could not be"),
        ("clip-train", "recipe=small name", "name: missing EQUAL at '<EOF>'; a word is KEY=VALUE"),
        ("clip-train", "recipe=small name=a=b", "name=a=b: mismatched input '='"),
        ("clip-train", "recipe=small loss=null", "loss: a group takes the name of a file"),
        ("clip-train", "recipe=small ema=null", "ema: a group takes the name of a file: ema=none"),
        ("clip-train", "recipe=small +optimizer.lr=3", "Could not append to config. An item is"),
        ("clip-train", "-m recipe=small,smal seed=0", "recipe=smal: no such recipe; did you mean"),
        ("clip-eval", "eval=[retrieval,emojis]", "eval=emojis: no such eval; did you mean emoji?"),
        ("clip-export", "format=onnx", "format=onnx: no such format; known: features, open_clip"),
        ("clip-curate", "dataset=nosuch", "dataset=nosuch: no such dataset; known: emoji, raw"),
        (
            "clip-curate",
            "plan engine.wrokers=1",
            "engine.wrokers: unknown; did you mean workers? known: workers, tasks",
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(type_in, command, words, message):
    code, _, err = type_in(COMMANDS[command], *words.split())
    assert code == 2
    assert err.startswith(f"{command}: {message}") and err.count("\n") == 1, err


def test_a_mistake_in_a_recipe_names_its_file(type_in, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nsample_seen: 3\n")
    where = f"--config-dir={tmp_path}"
    code, _, err = type_in(pipeline.train.main, where, "recipe=mine")
    assert code == 2
    assert err.startswith("clip-train: conf/recipe/mine.yaml: sample_seen: unknown; did you mean")
    (tmp_path / "recipe" / "mine.yaml").write_text("a: [")
    code, _, err = type_in(pipeline.train.main, where, "recipe=mine")
    assert code == 2 and "mine.yaml" in err


@pytest.mark.parametrize(
    ("command", "choice"), zip(COMMANDS, ["small", "retrieval", "open_clip", "raw"], strict=True)
)
def test_help_says_what_a_command_does_and_what_it_knows(type_in, command, choice):
    for words in (["--help"], ["recipe=small", "-h"]):
        code, out, err = type_in(COMMANDS[command], *words)
        assert (code, err) == (0, "")
        assert out.startswith(f"{command}: ") and f"\n    {command} " in out
        assert f"\n  {choice}  " in out and "--cfg job" in out


def test_a_sentence_ends_where_the_next_begins(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# @package _global_\n# On 2.5 B pairs of\n# arXiv:1. Price: none.\nb: 1\n")
    assert first_sentence(path) == "On 2.5 B pairs of arXiv:1."


def crash(error):
    @entry("clip-x", config="dashboard")
    def main(cfg):
        if error is None:
            return cfg.entity.nothing
        raise error

    return main


def test_a_crash_stays_a_crash(type_in, monkeypatch):
    code, _, err = type_in(crash(RuntimeError("no memory")), "entity=me")
    assert code == 1 and "RuntimeError: no memory" in err
    assert type_in(crash(None), "entity=me")[0] == 1  # an error of omegaconf's, of ours
    code, _, err = type_in(crash(ValueError("too many")), "entity=me")
    assert (code, err) == (2, "clip-x: too many\n")
    with pytest.raises(RuntimeError):
        crash(RuntimeError())(OmegaConf.create())
    monkeypatch.setenv("PAIRWRIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too many"):
        crash(ValueError("too many"))(OmegaConf.create())


def test_hydras_own_word_shows_where_it_was_raised(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["command", "nothing=1"])
    with pytest.raises(Exception, match="Could not override 'nothing'"):
        crash(None)()


def test_the_real_command(root):
    command = [sys.executable, "-m", "pipeline.report", "rum=runs/x"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "clip-report: rum: unknown; did you mean run? known: run\n"
