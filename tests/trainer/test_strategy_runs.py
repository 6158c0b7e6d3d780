"""Real runs on every strategy: a checkpoint of one is a checkpoint of all."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pipeline.evals.trained import TrainedClip, read_checkpoint
from pipeline.phases import phases
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.run import make_module
from tests.trainer import strategy_runs as runs

FAST = ["ddp", "fsdp", "deepspeed_1", "deepspeed_3", "ddp"]
SLOW = [
    "deepspeed_2",
    "deepspeed_3",
    "fsdp",
    "deepspeed_3",
    "deepspeed_0",
    "deepspeed_2",
    "deepspeed_3_offload",
    "deepspeed_2_offload",
    "fsdp",
]
LAMB = ["fsdp", "deepspeed_1", "deepspeed_3", "ddp", "deepspeed_2_offload", "deepspeed_3_offload"]


@pytest.fixture(
    scope="module",
    params=[
        (FAST, ["fsdp"], []),
        pytest.param((SLOW, sorted(set(SLOW)), []), marks=pytest.mark.slow),
        pytest.param((LAMB, ["deepspeed_1"], ["optimizer=lamb"]), marks=pytest.mark.slow),
    ],
    ids=["fast", "slow", "lamb"],
)
def relay(request, data, tmp_path_factory):
    """(folder of the runs, strategies in order, strategies of the faulty runs)"""
    folder, (strategies, faulty, more) = tmp_path_factory.mktemp("relay"), request.param
    arguments = (runs.free_port(), data, folder, strategies, faulty, more)
    mp.spawn(runs.relay, args=arguments, nprocs=2)
    return folder, strategies, faulty


def checkpoint(folder, run, step):
    return read_checkpoint(folder / run / "checkpoints" / f"step-{step:08d}.ckpt")


def test_the_relay_trains_as_one_run(relay):
    folder, strategies, _ = relay
    ours, alone = (read_metrics(folder / name) for name in ("relay", "ddp"))
    assert [row["step"] for row in ours] == list(range(1, runs.LEG * len(strategies) + 1))
    for a, b in zip(ours, alone, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=2e-5)
        assert a["train/logit_scale"] == pytest.approx(b["train/logit_scale"], abs=1e-4)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=2e-3)
        assert a["train/skipped_steps"] == 0
    assert min(row["train/grad_norm"] for row in alone[:2]) > 0.5  # clipping had to bite


def test_what_happens_to_one_rank_is_seen(relay):
    """Bad records are those of all ranks and lives; the wait for data is the slowest rank's."""
    folder, _, _ = relay
    for row in read_metrics(folder / "relay"):
        assert row["data/bad_records"] == 3 * row["step"]
        assert 0.8 < row["perf/data_wait_fraction"] < 1


def test_loading_changes_nothing(relay):
    """Weights and optimizer state, bit for bit, whatever wrote them and whatever reads them."""
    folder, strategies, _ = relay
    for step in range(runs.LEG, runs.LEG * len(strategies), runs.LEG):
        written = checkpoint(folder, "relay", step)
        loaded = read_checkpoint(folder / f"at_once-{step}.ckpt")
        assert written["state_dict"].keys() == loaded["state_dict"].keys()
        for name, tensor in written["state_dict"].items():
            assert torch.equal(tensor, loaded["state_dict"][name]), (step, name)
        (before,), (after,) = (c["optimizer_states"] for c in (written, loaded))
        assert before["state"].keys() == after["state"].keys()
        for index, state in before["state"].items():
            for key, value in state.items():
                assert torch.equal(value, after["state"][index][key]), (step, index, key)
        for group, same in zip(before["param_groups"], after["param_groups"], strict=True):
            assert group["params"] == same["params"] and group["names"] == same["names"]


def test_weights_are_ddps(relay):
    folder, strategies, _ = relay
    last = runs.LEG * len(strategies)
    ours, alone = (checkpoint(folder, name, last) for name in ("relay", "ddp"))
    for name, tensor in alone["state_dict"].items():
        assert ours["state_dict"][name].shape == tensor.shape
        assert torch.allclose(ours["state_dict"][name], tensor, atol=2e-3), name
    (mine,), (theirs,) = (c["optimizer_states"] for c in (ours, alone))
    for index, state in theirs["state"].items():
        assert mine["state"][index]["step"] == state["step"] == last
        assert mine["state"][index]["exp_avg"].shape == state["exp_avg"].shape


def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight(relay):
    folder, _, faulty = relay
    for name in faulty:
        rows = read_metrics(folder / f"faulty_{name}")
        assert [row["train/skipped_steps"] for row in rows] == [0, 1, 2, 2], name
        assert [math.isfinite(row["train/loss"]) for row in rows] == [True, False, False, True]
        one, _, three, four = (
            checkpoint(folder, f"faulty_{name}", step)["state_dict"] for step in range(1, 5)
        )
        assert all(torch.equal(one[key], three[key]) for key in one), name
        weight = "model.image_projection.weight"
        assert not torch.equal(three[weight], four[weight])


def test_evaluation_reads_them(relay):
    folder, _, _ = relay
    ours, alone = (TrainedClip.load(folder / name) for name in ("relay", "ddp"))
    embeds = ours.text_embed(["thing number 3"])
    assert torch.allclose(embeds, alone.text_embed(["thing number 3"]), atol=1e-2)


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    mp.spawn(runs.in_half_precision, args=(runs.free_port(), data, folder), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.HALF)
def test_half_precision_trains_as_float32_does(name, half):
    """bfloat16 keeps 8 bits, and moves a loss by no more; in micro-batches as whole."""
    exact, ours, whole = (
        read_metrics(half / run) for run in ("float32", f"half_{name}", f"half_{name}_whole")
    )
    assert len(exact) == len(ours) == len(whole) == 6
    for a, b, c in zip(ours, whole, exact, strict=True):
        assert a["train/loss"] == pytest.approx(c["train/loss"], abs=0.05)
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=0.05)
        assert a["train/grad_norm"] == pytest.approx(c["train/grad_norm"], rel=0.1)
        assert a["train/skipped_steps"] == 0
    assert exact[-1]["train/loss"] < exact[0]["train/loss"] - 0.1
    weights = checkpoint(half, f"half_{name}", 6)["state_dict"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    resumed = read_metrics(half / f"half_{name}_resumed")
    assert [row["train/loss"] for row in resumed] == [row["train/loss"] for row in ours]
    start = checkpoint(half, f"half_{name}", 2)["state_dict"]
    moved = [key for key in weights if not torch.equal(weights[key], start[key])]
    assert len(moved) == len(weights)  # no parameter without a gradient


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    mp.spawn(runs.kept_in_checkpoints, args=(runs.free_port(), data, folder), nprocs=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_2", "deepspeed_3"])
def test_a_frozen_tower_is_not_rounded_by_bfloat16(name, kept, data):
    """As the seed drew it, before and after a checkpoint was read."""
    cfg = runs.config_of(data, kept, "start", 4, ["trainer.devices=1"])
    start = make_module(phases(cfg)[0], fresh=True).state_dict()
    image = [key for key in start if key.startswith("model.image.")]
    assert any(not torch.equal(start[key], start[key].bfloat16().float()) for key in image)
    for step in (2, 4):
        saved = checkpoint(kept, f"frozen_{name}", step)["state_dict"]
        assert all(torch.equal(saved[key], start[key]) for key in image)
        text = "model.text.token_embed.weight"
        assert not torch.equal(saved[text], start[text])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_2", "deepspeed_3"])
def test_the_loss_scale_of_zero_goes_on(name, kept):
    """It begins at 65536 with steps that are skipped, which a resumed run does not repeat."""
    whole, resumed = (
        [(row["train/loss"], row["train/skipped_steps"]) for row in read_metrics(kept / run)]
        for run in (f"float16_{name}", f"float16_{name}_resumed")
    )
    assert whole == resumed and whole[-1][1] > 0
    ours, theirs = (
        checkpoint(kept, run, 6) for run in (f"float16_{name}", f"float16_{name}_resumed")
    )
    assert ours["zero_loss_scale"] == theirs["zero_loss_scale"]
    assert ours["zero_loss_scale"]["last_overflow_iter"] >= 0
    assert all(
        torch.equal(ours["state_dict"][key], tensor) for key, tensor in theirs["state_dict"].items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "deepspeed_2"])
def test_a_phase_may_leave_the_moments_behind(name, kept):
    rows = read_metrics(kept / f"reset_{name}")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    (content,) = checkpoint(kept, f"reset_{name}", 4)["optimizer_states"]
    assert {int(state["step"]) for state in content["state"].values()} == {2}


PHASED = ["ddp", "fsdp", "deepspeed_1", "deepspeed_3"]


@pytest.fixture(scope="module")
def phased(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phased")
    mp.spawn(runs.phased, args=(runs.free_port(), data, folder, PHASED), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PHASED[1:])
def test_phases_are_handed_over(name, phased):
    """Position tables resized, a tower thawed, moments kept by name, averages kept whole."""
    ours, alone = (read_metrics(phased / f"phased_{n}") for n in (name, "ddp"))
    assert len(ours) == len(alone) == 4
    # A flat piece of ZeRO has one count of steps: what was frozen starts with shorter ones.
    exact = 3 if name.startswith("deepspeed") else 4
    for a, b in zip(ours[:exact], alone[:exact], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=2e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=2e-3)
    assert ours[3]["train/loss"] == pytest.approx(alone[3]["train/loss"], abs=0.1)
    mine, theirs = (checkpoint(phased, f"phased_{n}", 4) for n in (name, "ddp"))
    for key, tensor in theirs["state_dict"].items():
        assert mine["state_dict"][key].shape == tensor.shape
        assert torch.allclose(mine["state_dict"][key], tensor, atol=2e-3), key
    if name != "deepspeed_3":
        mine, theirs = (c["callbacks"]["Ema"]["weights"] for c in (mine, theirs))
        assert mine.keys() == theirs.keys()
        for key, average in theirs.items():
            assert mine[key].shape == average.shape, key
            assert torch.allclose(mine[key], average, atol=2e-3), key
        TrainedClip.load(phased / f"phased_{name}", weights="ema")


class WithDropout(pl.Callback):
    """A tower that draws, as a Hugging Face text tower does."""

    def setup(self, trainer, pl_module, stage):
        for block in pl_module.model.text.transformer.blocks:
            block.mlp.activation = nn.Sequential(block.mlp.activation, nn.Dropout(0.3))


def test_a_tower_that_draws_continues_bit_identically(data, tmp_path):
    losses = {}
    for name, legs in {"whole": [4], "two_legs": [2, 4], "without": [4]}.items():
        for end in legs:
            torch.rand(end)  # whatever else drew in the process
            cfg = runs.config_of(data, tmp_path, name, 4, ["trainer.devices=1"])
            callbacks = [] if name == "without" else [WithDropout()]
            runs.run(cfg, runs.StopAt(end), *callbacks)
        losses[name] = [row["train/loss"] for row in read_metrics(tmp_path / name)]
    assert losses["whole"] == losses["two_legs"] != losses["without"]
