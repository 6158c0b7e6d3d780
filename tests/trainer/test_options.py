"""What a config asks for and a run would not do is refused before anything is built; a run that is
stopped early says so, and no phase is begun behind it.
"""

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from torch import nn

from pipeline.check import main
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.identity import claim, run_directory
from pipeline.trainer.options import INSTEAD, option_problems, refuse_wrong_options
from pipeline.trainer.run import make_trainer, phases, train
from tests.trainer import strategy_runs as runs

PHASES = [
    "every_phase=null",
    "samples_seen=???",
    *[f"+phases.{name}.samples_seen=96" for name in ("one", "two")],
    *[f"+phases.{name}.schedule.warmup_samples=32" for name in ("one", "two")],
]


@pytest.fixture(scope="module")
def config(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return lambda *words, name="x": runs.config_of(
        data, folder, name, 3, ["trainer.devices=1", *words]
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["gradient_clip_norm=0"], "gradient_clip_norm: 0.0 must be above 0, or null for none"),
        (["gradient_clip_norm=-1"], "gradient_clip_norm: -1.0 must be above 0, or null for none"),
        (["log_every_steps=0"], "log_every_steps: 0 must be at least 1"),
        (["+trainer.max_steps=2"], "trainer.max_steps: .* set samples_seen"),
        (["+trainer.logger=false"], "trainer.logger: .* set tracking"),
        (["+trainer.fast_dev_run=true"], "trainer.fast_dev_run: .* give debug=tiny"),
        (["trainer.precision=bf16-true"], "trainer.precision: bf16-true .* set bf16-mixed"),
        ([*PHASES, "+phases.two.gradient_clip_norm=0"], "phases.two.gradient_clip_norm: 0.0 must"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_options_that_a_run_would_get_wrong(config, words, problem):
    cfg = config(*words)
    with pytest.raises(ValueError, match=problem):
        train(cfg)
    assert len(option_problems(cfg)) == 1


def test_options_that_are_right(config):
    for words in ([], PHASES, ["gradient_clip_norm=null"], ["trainer.precision=64-true"]):
        refuse_wrong_options(config(*words))
    assert option_problems(OmegaConf.create({"run": "runs/x"})) == []


def test_what_a_run_sets_itself_is_known(config, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("pipeline.trainer.run.build", lambda node, **extra: given.update(extra))
    monkeypatch.setattr("pipeline.trainer.run.refuse_wrong_trainer", lambda *_: None)
    make_trainer(phases(config("callbacks=[]"))[0], tmp_path, [])
    assert given and given.keys() <= INSTEAD.keys()


def test_the_check_says_it_too(capsys):
    with pytest.raises(SystemExit):
        main(["recipe=small", "name=x", "data.shards=y", "gradient_clip_norm=0"])
    assert "gradient_clip_norm: 0.0 must be above 0" in capsys.readouterr().out


def test_the_precision_belongs_to_a_name_and_the_devices_do_not(config):
    cfg = config(name="named")
    claim(cfg, run_directory(cfg))
    cfg.trainer.devices = 4
    claim(cfg, run_directory(cfg))
    for same in ("32", 32, None):
        cfg.trainer.precision = same
        claim(cfg, run_directory(cfg))
    cfg.trainer.precision = "bf16-mixed"
    with pytest.raises(ValueError, match="trainer.precision: was '32-true', now 'bf16-mixed'"):
        claim(cfg, run_directory(cfg))


def test_float32_products_are_rounded_as_asked(config, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr("pipeline.trainer.run.make_trainer", lambda *_: 1 / 0)
    for word in ("highest", "high"):
        cfg = config(name=word)
        with open_dict(cfg):
            cfg.float32_matmul_precision = word
        with pytest.raises(ZeroDivisionError):
            train(cfg)
    assert asked == ["highest", "high"]
    with pytest.raises(ValueError, match="'tf32' is none of highest, high, medium"):
        refuse_wrong_options(OmegaConf.create({"float32_matmul_precision": "tf32"}))


@pytest.mark.slow
def test_every_phase_is_compiled(config, monkeypatch):
    """Uneven micro-batches and two towers: as many graphs of a block as Dynamo allows by itself."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled(block, backend="eager"))
    cfg = config(*PHASES, "compile_towers=true", "+phases.one.model.image.image_size=16")
    # 8: what it is by itself
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        train(cfg)


def test_stopped_early_it_writes_a_checkpoint_and_begins_no_phase(config, monkeypatch, caplog):
    whole = train(config(*PHASES, name="whole"))
    cfg = config(*PHASES, "checkpoint_every_steps=100", name="stopped")
    stopping = runs.StopAt(2)
    made = make_trainer

    def with_stop(*arguments):
        trainer = made(*arguments)
        trainer.callbacks.append(stopping)
        return trainer

    monkeypatch.setattr("pipeline.trainer.run.make_trainer", with_stop)
    with pytest.raises(SystemExit) as ended:
        train(cfg)
    assert ended.value.code == 75 and "stopped after step 2 of 3" in caplog.text
    (path,) = (whole.parent / "stopped" / "checkpoints").glob("*.ckpt")
    assert path.stem == "step-00000002" and str(path) in caplog.text

    stopping.step = 100
    losses = [[row["train/loss"] for row in read_metrics(run)] for run in (whole, train(cfg))]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ours, theirs = (
        torch.load(whole.parent / name / "checkpoints/step-00000006.ckpt", weights_only=True)
        for name in ("stopped", "whole")
    )
    assert all(torch.equal(ours["state_dict"][n], w) for n, w in theirs["state_dict"].items())


def test_time_that_is_used_up_is_no_endless_loop(config):
    cfg = config("+trainer.max_time=00:00:00:00", name="no_time")
    with pytest.raises(ValueError, match="before step 1 of 3: trainer.max_time .* is used up"):
        train(cfg)
