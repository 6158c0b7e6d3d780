"""What would be silently wrong is refused, and a run whose gradients stay broken ends."""

import random
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from pipeline.config import build
from pipeline.formats.initial import InitialWeights
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.random_state import RandomState
from pipeline.trainer.skipped_steps import SkippedSteps
from pipeline.trainer.strategies.adapter import refuse_wrong_model, refuse_wrong_trainer
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy
from pipeline.trainer.strategies.zero import ZeroStrategy, refuse_whole_parameter_rules
from tests.trainer import strategy_cases as cases
from tests.trainer import strategy_runs as runs


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, "set micro_batch_size"),
        ({"gradient_clip_val": 1.0}, "set gradient_clip_norm"),
        ({"strategy": "deepspeed_stage_2"}, "trainer=deepspeed_1, deepspeed_2, deepspeed_3"),
        (
            {"strategy": pl.strategies.ModelParallelStrategy(), "devices": 2},
            r"trainer=fsdp \(FSDP2\)",
        ),
        ({"strategy": DDPStrategy(static_graph=True)}, "static_graph"),
        ({"strategy": "ddp_spawn", "devices": 2}, "processes by spawn .* use trainer=ddp"),
        ({"strategy": FullyShardedStrategy(gather_bfloat16=True)}, "gather_bfloat16 .*=bf16-mixed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_trainers_that_would_be_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        refuse_wrong_trainer(trainer(**options))


@pytest.mark.parametrize("strategy", ["auto", "ddp", FullyShardedStrategy(), ZeroStrategy(stage=2)])
def test_trainers_that_are_right(strategy):
    refuse_wrong_trainer(trainer(strategy=strategy))


def test_batch_norm_in_micro_batches():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="1 normalises over the batch .* micro_batch_size=null"):
        refuse_wrong_model(trainer(), model, micro_batch_size=4, compiled=False)
    refuse_wrong_model(trainer(), model, micro_batch_size=None, compiled=False)


def test_compiled_towers_in_pieces():
    with pytest.raises(ValueError, match="compile_towers=false"):
        refuse_wrong_model(
            trainer(strategy=ZeroStrategy(stage=3)),
            nn.Linear(2, 2),
            micro_batch_size=None,
            compiled=True,
        )


@pytest.mark.parametrize(("stage", "offload"), [(4, False), (-1, False), (0, True)])
def test_stages_that_are_none(stage, offload):
    with pytest.raises(ValueError, match="a stage is 0, 1, 2 or 3"):
        ZeroStrategy(stage=stage, offload=offload)


def test_optimizers_that_need_whole_parameters():
    class Shampoo(torch.optim.SGD.__base__):
        pass

    weights = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(ValueError, match="Shampoo looks at whole parameters"):
        refuse_whole_parameter_rules(Shampoo(weights, {}))
    refuse_whole_parameter_rules(torch.optim.AdamW(weights))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer=fsdp", "trainer.precision=16-mixed"], "does not support .*16-mixed"),
        (["trainer=deepspeed_1", "trainer.strategy.stage=9"], "a stage is 0"),
        (["trainer=fsdp", "trainer.strategy.reduce_gradients=Each"], "=Each: once or each"),
        (["trainer=deepspeed_2", "trainer.strategy.reduce_gradients=all"], "=all: once or each"),
        (["trainer.precision=16-mixed"], "16-mixed on a CPU, .*trainer.precision=bf16-mixed"),
    ],
)
def test_what_constructors_refuse_is_a_message(words, message, data, tmp_path):
    cfg = runs.config_of(data, tmp_path, "x", 4, [*words, "trainer.devices=1"])
    with pytest.raises(ValueError, match=message):
        runs.run(cfg)


def test_a_run_ends_when_gradients_stay_broken(data, tmp_path):
    words = ["trainer.devices=1", "max_skipped_steps=2", *runs.fault(rank=0, steps=[2, 4, 5, 6, 7])]
    cfg = runs.config_of(data, tmp_path, "broken", 9, words)
    with pytest.raises(ValueError, match="not finite in 3 steps in a row") as caught:
        runs.run(cfg)
    last_good = tmp_path / "broken" / "checkpoints" / "step-00000004.ckpt"
    assert str(last_good) in str(caught.value) and "at 192 pairs" in str(caught.value)
    weights = torch.load(last_good, weights_only=True)["state_dict"].values()
    assert all(tensor.isfinite().all() for tensor in weights)

    cure = re.search(r"init=weights (init.model=\S+)", str(caught.value))[1]
    path = cure.partition("=")[2]
    init = f"init={{_target_: {InitialWeights.__module__}.InitialWeights, model: {path}}}"
    words = ["trainer.devices=1", "gradient_clip_norm=1", init]  # debug=tiny has no group of it
    runs.run(runs.config_of(data, tmp_path, "cured", 3, words))
    first = read_metrics(tmp_path / "cured")[0]
    after = next(row for row in read_metrics(tmp_path / "broken") if row["step"] == 4)
    assert first["train/logit_scale"] == pytest.approx(after["train/logit_scale"], rel=1e-2)
    assert first["train/skipped_steps"] == 0


def test_steps_in_a_row_count():
    skipped = SkippedSteps(limit=1)
    for applied in (False, True, False, True):
        skipped.record(applied, samples_seen=0, last_good=lambda: None)
    assert skipped.total == 2
    skipped.record(False, samples_seen=64, last_good=lambda: None)
    with pytest.raises(ValueError, match="has not reached its first"):
        skipped.record(False, samples_seen=96, last_good=lambda: None)
    with pytest.raises(ValueError, match="max_skipped_steps -1 is negative"):
        SkippedSteps(limit=-1)


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_state_is_replayed_and_goes_on():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    state = RandomState.of(torch.device("cpu"))
    first, second, third = draws(), draws(), draws()
    assert len({*first, *second, *third}) == 9
    state.restore()
    assert (draws(), draws()) == (first, second)
    with state.replayed():
        assert draws() == first
    assert draws() == third


def test_the_loss_scale_of_float16_is_applied_once():
    """As the trainer's plugin does it: scaled in every backward, unscaled before clipping."""
    expected, _ = cases.oracle(1, torch.float32, 3)
    trained, scaler = cases.Trained(torch.float32), torch.amp.GradScaler("cpu", init_scale=1024.0)
    adapter = cases.SingleProcess(
        model=trained, backward=lambda loss: scaler.scale(loss).backward()
    )
    torch.manual_seed(100)
    with torch.autocast("cpu", torch.float16):
        cases.step_of(trained, adapter, 3)(*cases.batch_of(0, torch.float32))
    scaler.unscale_(torch.optim.SGD(trained.parameters(), lr=1.0))
    for name, gradient in cases.whole_gradients(trained).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 2e-2 * expected[name].norm() + 2e-3, name


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients():
    from pipeline.trainer.strategies.blocks import blocks

    gradients = []
    for compiled in (False, True):
        trained = cases.Trained(torch.float32, dropout=0.0)
        if compiled:
            for block in blocks(trained.model):
                block.compile()
        cases.step_of(trained, cases.SingleProcess(model=trained), 4)(
            *cases.batch_of(0, torch.float32)
        )
        gradients.append(cases.whole_gradients(trained))
    assert len(blocks(trained.model)) == 4
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_words_of_the_strategies(data, tmp_path):
    for words in runs.WORDS.values():
        strategy = runs.config_of(data, tmp_path, "x", 4, words).trainer.strategy
        assert strategy == "ddp" or build(strategy) is not None
