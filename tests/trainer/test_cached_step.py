"""The cached step against one process that puts all pairs through the towers at once.

Letters: B pairs of a rank, G pairs of all ranks.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed import Peers
from pipeline.losses.features import PairFeatures
from pipeline.losses.objective import Objective
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.random import RandomTokens
from pipeline.trainer import cached_step
from pipeline.trainer.cached_step import CachedContrastiveStep, ddp_backward

WORLD = 2
BATCH = 8  # no multiple of 3, so that the last micro-batch is smaller
MICRO_BATCHES = (1, 3, BATCH)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
LENGTH, START, END = 9, 28, 29

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def model_of(dtype: torch.dtype) -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        image=VisionTransformer(image_size=8, patch_size=2, width=16, layers=2, heads=2),
        text=TextTransformer(vocab_size=30, context_length=LENGTH, width=16, layers=2, heads=2),
        embed_dim=8,
        # A mild scale keeps gradients near 1, where float32 is good to 1e-6.
        init_logit_scale=3.0,
    ).to(dtype)


def batch_of(index: int, dtype: torch.dtype) -> Batch:
    """Rank `index`'s pairs with dropped tokens: half of the patches, three of a caption's words."""
    generator = torch.Generator().manual_seed(10 + index)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, START, (BATCH, LENGTH), generator=generator)
    tokens[:, 0], tokens[:, -1] = START, END
    image_kept = RandomTokens(keep=0.5).kept(BATCH, 16, generator)
    words = 1 + torch.rand(BATCH, LENGTH - 2, generator=generator).argsort(1)[:, :4].sort(1).values
    ends = torch.tensor([[0, LENGTH - 1]]).expand(BATCH, 2)
    text_kept = torch.cat([ends[:, :1], words, ends[:, 1:]], dim=1)
    return images.to(dtype), tokens, image_kept, text_kept


def oracle(world: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of all pairs at once, the loss written out."""
    model = model_of(dtype)
    batch = [
        torch.cat(parts) for parts in zip(*(batch_of(i, dtype) for i in range(world)), strict=True)
    ]
    image_embed, text_embed = model(*batch)
    logits = model.log_logit_scale.exp() * image_embed @ text_embed.T
    to_texts, to_images = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    loss = -(to_texts + to_images).mean() / 2
    loss.backward()
    return gradients_of(model), loss.item()


def gradients_of(model: CLIP) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def step_for(model: CLIP, micro_batch_size: int | None, **changes: Any) -> CachedContrastiveStep:
    options = {
        "encode": model,
        "loss_parameters": model.loss_parameters(),
        "loss_scalars": model.loss_scalars,
        "objective": Objective(terms={"softmax": SoftmaxLoss()}),
        "micro_batch_size": micro_batch_size,
    }
    return CachedContrastiveStep(**(options | changes))


def largest_difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    assert "log_logit_scale" in expected
    return max((gradients[name] - expected[name]).abs().max().item() for name in expected)


# One process


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("micro_batch_size", [*MICRO_BATCHES, None, 100])
def test_one_process_equals_the_oracle(micro_batch_size: int | None, dtype: torch.dtype) -> None:
    expected, loss = oracle(1, dtype)
    model = model_of(dtype)
    logged = step_for(model, micro_batch_size)(*batch_of(0, dtype))
    assert largest_difference(gradients_of(model), expected) <= TOLERANCE[dtype]
    assert list(logged) == ["loss", "softmax", "logit_scale"]
    assert logged["loss"].item() == logged["softmax"].item() == pytest.approx(loss, rel=1e-6)
    assert logged["logit_scale"].item() == pytest.approx(3.0, rel=1e-6)
    assert not any(value.requires_grad for value in logged.values())


def test_the_oracle_can_tell() -> None:
    """No gradient is so small that a missing one would pass as equal."""
    for world in (1, WORLD):
        expected, _ = oracle(world, torch.float64)
        assert min(gradient.abs().max().item() for gradient in expected.values()) > 1e-3


def test_without_dropped_tokens() -> None:
    images, tokens, _, _ = batch_of(0, torch.float64)
    gradients = []
    for micro_batch_size in (None, 3):
        model = model_of(torch.float64)
        step_for(model, micro_batch_size)(images, tokens)
        gradients.append(gradients_of(model))
    assert largest_difference(*gradients) <= 1e-12


def test_redrawing_dropped_tokens_is_noticed() -> None:
    """What a step does that draws inside the towers: the second pass sees other tokens."""
    expected, _ = oracle(1, torch.float64)
    model = model_of(torch.float64)
    fixed = iter(batch_of(0, torch.float64)[2].split(3))
    redrawn = torch.Generator().manual_seed(99)

    def encode(images: Tensor, tokens: Tensor, _: Tensor, text_kept: Tensor) -> Any:
        kept = next(fixed, None)
        if kept is None:
            kept = RandomTokens(keep=0.5).kept(len(images), 16, redrawn)
        return model(images, tokens, kept, text_kept)

    step_for(model, 3, encode=encode)(*batch_of(0, torch.float64))
    assert largest_difference(gradients_of(model), expected) > 1e-3


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_cost_is_one_forward_more_and_one_micro_batch_of_memory(micro_batch_size: int) -> None:
    model = model_of(torch.float32)
    rows, graphs = [], {"alive": 0, "most": 0}

    def encode(*batch: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(batch[0]))
        image_embed, text_embed = model(*batch)
        if image_embed.requires_grad:
            graphs["alive"] += 1
            graphs["most"] = max(graphs["most"], graphs["alive"])
            image_embed.register_hook(lambda _: graphs.update(alive=graphs["alive"] - 1))
        return image_embed, text_embed

    step_for(model, micro_batch_size, encode=encode)(*batch_of(0, torch.float32))
    last = BATCH % micro_batch_size or micro_batch_size
    assert sum(rows) == 2 * BATCH - last
    assert max(rows) == micro_batch_size
    assert graphs == {"alive": 0, "most": 1}


def test_frozen_scale_stays_without_gradient() -> None:
    expected, _ = oracle(1, torch.float64)
    model = model_of(torch.float64)
    model.log_logit_scale.requires_grad_(False)
    step_for(model, 3)(*batch_of(0, torch.float64))
    assert model.log_logit_scale.grad is None
    model.log_logit_scale.grad = expected["log_logit_scale"]
    assert largest_difference(gradients_of(model), expected) <= 1e-6


def test_objective_is_evaluated_in_float32() -> None:
    model = model_of(torch.float32)
    seen = []

    def objective(features: PairFeatures) -> tuple[Tensor, dict[str, Tensor]]:
        logits = features.logit_scale * features.image_embed @ features.all_text_embed.T
        seen.extend([features.image_embed.dtype, features.all_text_embed.dtype, logits.dtype])
        return logits.logsumexp(1).mean(), {}

    def encode(*batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(embed.bfloat16() for embed in model(*batch))

    with torch.autocast("cpu", torch.bfloat16):
        step_for(model, 3, objective=objective, encode=encode)(*batch_of(0, torch.float32))
    assert seen == [torch.float32] * 3


def test_all_parameters_have_gradients_under_autocast() -> None:
    """Also if one autocast context spans both passes, as Lightning's does."""
    gradients = []
    for micro_batch_size in (None, 3):
        model = model_of(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            step_for(model, micro_batch_size)(*batch_of(0, torch.float32))
        gradients.append(gradients_of(model))
    assert largest_difference(*gradients) <= 2e-2


def test_mistakes_are_named() -> None:
    model = model_of(torch.float32)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"micro_batch_size {size} is below 1"):
            step_for(model, size)
    images, tokens, image_kept, text_kept = batch_of(0, torch.float32)
    with pytest.raises(ValueError, match=r"\[8, 7, 8, 8\]"):
        step_for(model, 3)(images, tokens[1:], image_kept, text_kept)
    with pytest.raises(ValueError, match="at least one pair"):
        step_for(model, 3)(images[:0], tokens[:0])


# Two processes with torch's DistributedDataParallel


def counting_ddp(model: CLIP) -> tuple[DistributedDataParallel, list[list[str]]]:
    """The wrapped model, and a list that grows by the names in each reduced bucket."""
    # Small buckets, so that there are several.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.005)
    names = {parameter: name for name, parameter in model.named_parameters()}
    reduced: list[list[str]] = []

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append([names[parameter] for parameter in bucket.parameters()])
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, hook)
    return wrapped, reduced


def run_steps(index: int, dtype: torch.dtype, size: int, **changes: Any) -> dict[str, Any]:
    """Two steps, since DistributedDataParallel rebuilds its buckets after the first."""
    model = model_of(dtype)
    wrapped, reduced = counting_ddp(model)
    options = {"encode": wrapped, "backward": ddp_backward(wrapped), "no_sync": wrapped.no_sync}
    step = step_for(model, size, **(options | changes))
    results = []
    for _ in range(2):
        reduced.clear()
        wrapped.zero_grad(set_to_none=True)
        logged = step(*batch_of(index, dtype))
        results.append(
            {"gradients": gradients_of(model), "reduced": list(reduced), "loss": logged["loss"]}
        )
    return {"steps": results}


class WithoutGradient(Peers):
    def gather(self, rows: Tensor) -> Tensor:
        """The own rows keep their gradient and the others' do not (open_clip's default)."""
        gathered = [torch.empty_like(rows) for _ in range(WORLD)]
        dist.all_gather(gathered, rows.detach())
        gathered[dist.get_rank()] = rows
        return torch.cat(gathered)


def run_controls(index: int) -> dict[str, Any]:
    """What must be noticed: a reduction per micro-batch, no gradient through the gather."""
    dtype = torch.float64
    model = model_of(dtype)
    wrapped, reduced = counting_ddp(model)
    armed = ddp_backward(wrapped)
    every_time = step_for(
        model,
        3,
        # The reducer waits for all parameters, and the scale is in the last surrogate only.
        backward=lambda loss: armed(loss + 0 * model.log_logit_scale),
        no_sync=nullcontext,
    )
    every_time(*batch_of(index, dtype))
    correct = cached_step.peers
    cached_step.peers = lambda: WithoutGradient(index, WORLD)
    without_gradient = run_steps(index, dtype, 3)
    cached_step.peers = correct
    return {
        "every_time": {"reduced": reduced, "gradients": gradients_of(model)},
        "without_gradient": without_gradient,
    }


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def run_unequal(index: int) -> list[str]:
    batch = batch_of(index, torch.float32)
    step = step_for(model_of(torch.float32), None)
    shorter = [rows[index:] for rows in batch]
    messages = [message_of(lambda: step(*shorter))]
    step(*batch)
    return [*messages, message_of(lambda: step(*(rows[1:] for rows in batch)))]


def run_rank(index: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=index, world_size=WORLD
    )
    results: dict[Any, Any] = {
        (str(dtype), size): run_steps(index, dtype, size)
        for dtype in TOLERANCE
        for size in MICRO_BATCHES
    }
    results["controls"] = run_controls(index)
    results["unequal"] = run_unequal(index)
    torch.save(results, Path(directory) / f"{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("cached_step")
    mp.spawn(run_rank, args=(os.fspath(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{index}.pt") for index in range(WORLD)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_two_processes_equal_the_oracle(
    micro_batch_size: int, dtype: torch.dtype, two_ranks: list[dict]
) -> None:
    expected, loss = oracle(WORLD, dtype)
    ranks = [results[str(dtype), micro_batch_size]["steps"] for results in two_ranks]
    for steps in zip(*ranks, strict=True):
        for step in steps:
            assert largest_difference(step["gradients"], expected) <= TOLERANCE[dtype]
        losses = [step["loss"].item() for step in steps]
        assert sum(losses) / WORLD == pytest.approx(loss, rel=1e-6)
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_every_bucket_is_reduced_once(micro_batch_size: int, two_ranks: list[dict]) -> None:
    names = sorted(dict(model_of(torch.float32).named_parameters()))
    for results in two_ranks:
        steps = results[str(torch.float64), micro_batch_size]["steps"]
        assert len(steps[-1]["reduced"]) > 1
        for step in steps:
            assert sorted(chain.from_iterable(step["reduced"])) == names


def test_reducing_in_every_micro_batch_is_noticed(two_ranks: list[dict]) -> None:
    """By its traffic alone: the gradient is right, being a mean over ranks of means over ranks."""
    expected, _ = oracle(WORLD, torch.float64)
    for results in two_ranks:
        control = results["controls"]["every_time"]
        assert sorted(chain.from_iterable(control["reduced"])) == sorted(3 * list(expected))
        assert largest_difference(control["gradients"], expected) <= 1e-6


def test_gathering_without_gradient_is_noticed(two_ranks: list[dict]) -> None:
    expected, _ = oracle(WORLD, torch.float64)
    for results in two_ranks:
        for step in results["controls"]["without_gradient"]["steps"]:
            assert largest_difference(step["gradients"], expected) > 1e-3


def test_unequal_local_batches_are_named_on_every_rank(two_ranks: list[dict]) -> None:
    for index, results in enumerate(two_ranks):
        first, later = results["unequal"]
        assert "local batches differ between ranks: [8, 7]" in first
        assert f"changed from 8 to 7 on rank {index}" in later
