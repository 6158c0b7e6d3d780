"""A config from a stranger: what it may call, and that nothing is called before that is known."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from pipeline.config import check
from pipeline.evals.trained import TrainedClip
from pipeline.evals.trained_captioner import captioner_config
from pipeline.targets import MAX_CONFIG, foreign_targets, read_config
from tests.evals.conftest import make_run

HOSTILE = (
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "pipeline.config.os.system",  # what a module of ours imports
    "pipeline.shards.write_atomically",  # a function of ours writes where it is told
    "pipeline.config.build",
    "pipeline.shards.os.replace",
    "lightning.pytorch.LightningModule",
    "Pipeline.models.clip.CLIP",
    "",
)


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("wrap", [lambda node: node, lambda node: [node], lambda node: {"a": node}])
def test_a_foreign_name_is_found_wherever_it_stands(target, wrap):
    node = {"model": {"_target_": "pipeline.models.clip.CLIP", "image": wrap({"_target_": target})}}
    found = foreign_targets(OmegaConf.create(node))
    assert len(found) == 1 and f"_target_: {target} is no component" in found[0]
    assert "allow_foreign_targets=true" in found[0]


@pytest.mark.parametrize(
    "target",
    [
        "pipeline.models.clip.CLIP",
        "curation.select.balance.Balance",
        "lightning.pytorch.Trainer",
        "pipeline.tracking.wandb.wandb_logger",
        "pipeline.models.clip.NoSuchClass",  # named by the check of signatures
    ],
)
def test_ours_are_not(target):
    assert foreign_targets(OmegaConf.create({"x": {"_target_": target}})) == []


def test_a_name_that_only_appears_when_it_is_read(monkeypatch):
    monkeypatch.setenv("NAME", "os.system")
    assert foreign_targets(OmegaConf.create({"x": {"_target_": "${oc.env:NAME}"}}))
    made = "${oc.create:{_target_:os.system,command:true}}"
    assert foreign_targets(OmegaConf.create({"x": made}))


def test_the_module_of_a_foreign_name_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass A: ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = OmegaConf.create({"allow_foreign_targets": False})
    cfg.model = {"_target_": "hostile_module.A"}
    with pytest.raises(ValueError, match=r"model\._target_: hostile_module\.A is no component"):
        check(cfg)
    assert not (tmp_path / "ran").exists()
    cfg.allow_foreign_targets = True
    check(cfg)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "train_captioner"])
def test_each_command_refuses(command, tmp_path):
    group = {"evaluate": "eval=emoji", "export": "format=open_clip"}.get(command, "name=n")
    node = f"+{'eval' if command == 'evaluate' else 'callbacks'}.x"
    node = "format" if command == "export" else node
    target = f"{'++' if command == 'export' else ''}{node}._target_=os.system"
    words = [group, target] + (["data.shards=x"] if "train" in command else ["run=r"])
    words += ["recipe=emoji"] if command == "train" else []
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{command}", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "os.system is no component of pairwright" in done.stderr


def test_a_run_of_a_stranger(tmp_path):
    run = make_run(tmp_path)
    config = OmegaConf.load(run / "config.yaml")
    config.transform = {"_target_": "os.system", "command": f"touch {tmp_path}/ran"}
    OmegaConf.save(config, run / "config.yaml")
    for load in (TrainedClip.load, captioner_config):
        with pytest.raises(ValueError, match=r"not to be trusted:\n.*os\.system"):
            load(run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: ${oc.env:HOME}\n", "an interpolation"),
        ("a: &a [1]\nb: *a\n", "YAML aliases"),
        ("a: !!python/object/apply:os.system [true]\n", "no config of a run"),
        ("- 1\n", "need keys and values"),
        ("a: [\n", "no config of a run"),
        ("a: \ud800", "no config of a run"),
        ("#" * (MAX_CONFIG + 1), "larger than"),
        ("[" * 100_000, "nested deeper"),
    ],
)
def test_a_config_is_values(text, words, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=words):
        read_config(path, allow_foreign_targets=False)


def test_numbers_of_a_run_are_read_as_hydra_reads_them(tmp_path):
    """YAML 1.1 alone takes 1e-3 for a word."""
    (tmp_path / "config.yaml").write_text("lr: 1e-3\nwords: [on, 0x1]\n")
    found = read_config(tmp_path / "config.yaml", allow_foreign_targets=False)
    assert found.lr == 0.001 and isinstance(found.lr, float)
