"""The cached step against one process that puts all pairs through the towers at once.

Letters: B pairs of a rank, G pairs of all ranks.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures
from pipeline.losses.objective import Objective
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.random import RandomTokens
from pipeline.trainer.cached_step import CachedContrastiveStep, encoded, formula

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


class Trained(nn.Module):
    """What a strategy wraps: the model, its forward as the step wants it."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model
        self.objective = Objective(terms={"softmax": SoftmaxLoss()})

    def forward(self, *chunk: Tensor) -> Any:
        return encoded(self.model, self.objective, chunk, frozenset())


def step_for(model: CLIP, micro_batch_size: int | None, **changes: Any) -> CachedContrastiveStep:
    trained = Trained(model)
    options = {
        "encode": trained,
        "loss_scalars": model.loss_scalars,
        "objective": formula(trained.objective),
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
    trained = Trained(model)

    def encode(images: Tensor, tokens: Tensor, _: Tensor, text_kept: Tensor) -> Any:
        kept = next(fixed, None)
        if kept is None:
            kept = RandomTokens(keep=0.5).kept(len(images), 16, redrawn)
        return trained(images, tokens, kept, text_kept)

    step_for(model, 3, encode=encode)(*batch_of(0, torch.float64))
    assert largest_difference(gradients_of(model), expected) > 1e-3


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_cost_is_one_forward_more_and_one_micro_batch_of_memory(micro_batch_size: int) -> None:
    model = model_of(torch.float32)
    rows, graphs, trained = [], {"alive": 0, "most": 0}, Trained(model)

    def encode(*batch: Tensor) -> Any:
        rows.append(len(batch[0]))
        embeddings, parameters = trained(*batch)
        if embeddings["image_embed"].requires_grad:
            graphs["alive"] += 1
            graphs["most"] = max(graphs["most"], graphs["alive"])
            done = lambda _: graphs.update(alive=graphs["alive"] - 1)  # noqa: E731
            embeddings["image_embed"].register_hook(done)
        return embeddings, parameters

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
    seen: list[torch.dtype] = []

    class Seeing(nn.Module):
        def forward(self, features: PairFeatures) -> tuple[Tensor, dict[str, Tensor]]:
            logits = features.logit_scale * features.image_embed @ features.all_text_embed.T
            seen.extend([features.image_embed.dtype, features.all_text_embed.dtype, logits.dtype])
            return logits.logsumexp(1).mean(), {}

    trained = Trained(model)

    def encode(*batch: Tensor) -> Any:
        embeddings, parameters = trained(*batch)
        return {name: embed.bfloat16() for name, embed in embeddings.items()}, parameters

    with torch.autocast("cpu", torch.bfloat16):
        step_for(model, 3, objective=formula(Seeing()), encode=encode)(*batch_of(0, torch.float32))
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
