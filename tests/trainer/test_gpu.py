"""The step, the loss's memory and a run on a CUDA device: `make test-gpu`.

The functions are run on the CPU too, so that only the device is new where there is one.
"""

import pytest
import torch
from torch import Tensor

from pipeline.losses.features import PairFeatures
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer.strategies.single import SingleProcess
from tests.trainer import strategy_cases as cases

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def on_gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


def gradients(device: str, micro: int, *, cached: bool) -> tuple[dict[str, Tensor], float]:
    """Of all pairs, in micro-batches or in one graph whose chunks draw their dropout alike."""
    trained = cases.Trained(torch.float64).to(device)
    batch = [rows.to(device) for rows in cases.batch_of(0, torch.float64)]
    torch.manual_seed(100)
    if cached:
        step = cases.step_of(trained, SingleProcess(model=trained), micro)
        loss = step(*batch)["loss"]
    else:
        chunks = zip(*(rows.split(micro) for rows in batch), strict=True)
        embeds = [trained(*chunk) for chunk in chunks]
        image, text = (
            torch.cat([part[0][name] for part in embeds]) for name in ("image_embed", "text_embed")
        )
        parameters = embeds[-1][1]
        own = {n.removeprefix("objective."): v for n, v in parameters.items() if "objective" in n}
        features = PairFeatures(
            image_embed=image, text_embed=text, **trained.model.loss_scalars(parameters)
        )
        loss, _ = trained.formula(features, own)
        loss.backward()
    return {name: p.grad.cpu() for name, p in trained.named_parameters()}, loss.item()


@devices
@pytest.mark.parametrize("micro", cases.MICRO_BATCHES)
def test_the_cached_step_draws_again_what_it_drew(device: str, micro: int) -> None:
    """Dropout and dropped tokens on, float64: the device's generator is replayed."""
    ours, loss = gradients(device, micro, cached=True)
    expected, value = gradients(device, micro, cached=False)
    assert loss == pytest.approx(value, abs=1e-12)
    assert max((ours[name] - expected[name]).abs().max() for name in expected) <= 1e-6


@on_gpu
@pytest.mark.parametrize("loss", [TiledSoftmaxLoss, TiledSigmoidLoss])
def test_a_tiled_loss_holds_features_and_a_tile(loss: type) -> None:
    """Four times the pairs take four times the features, and no more."""
    peaks = []
    for pairs in (16_384, 65_536):
        rows = [torch.randn(pairs, 256, device="cuda", requires_grad=True) for _ in range(2)]
        scalars = [torch.tensor(x, device="cuda", requires_grad=True) for x in (10.0, -10.0)]
        features = dict(
            zip(
                ("image_embed", "text_embed", "logit_scale", "logit_bias"),
                [*rows, *scalars],
                strict=True,
            )
        )
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss()(PairFeatures(**features)).backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    tile = 2 * 4096 * 4096 * 4
    assert peaks[1] <= 4 * peaks[0] + tile
    assert peaks[1] < 65_536**2  # a quarter of the logits


@on_gpu
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.precision=32-true"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=16-mixed"],
        ["trainer.precision=bf16-mixed", "micro_batch_size=7", "compile_towers=true"],
        ["trainer.precision=bf16-mixed", "trainer=fsdp"],
        ["loss=tiled_softmax"],
    ],
    ids=" ".join,
)
def test_a_run_on_the_device_is_the_cpus(words: list[str], train, data, tmp_path) -> None:
    """As near as the precision; and it goes on from a checkpoint."""
    train(data, tmp_path, "cpu", "gradient_clip_norm=1")
    device = ["gradient_clip_norm=1", *words, "trainer.accelerator=gpu"]
    train(data, tmp_path, "gpu", *device)
    exact, ours = (read_metrics(tmp_path / name) for name in ("cpu", "gpu"))
    for a, b in zip(ours, exact, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=0.05)
        assert a["perf/peak_memory_gib"] > 0
    newest = max((tmp_path / "gpu" / "checkpoints").glob("*.ckpt"))
    newest.unlink()
    train(data, tmp_path, "gpu", *device)
    again = read_metrics(tmp_path / "gpu")
    assert [row["samples_seen"] for row in again] == [row["samples_seen"] for row in ours]
    assert again[-1]["train/loss"] == pytest.approx(ours[-1]["train/loss"], abs=0.02)
