"""One optimizer step's backward, for a loss over more pairs than the towers hold at once.

Gradient caching (GradCache, arXiv:2101.06983): the loss is evaluated once on the embeddings of all
pairs; its gradient with respect to the embeddings is then all that a micro-batch needs for its own
backward.
Letters: B local pairs, G global pairs, L text positions, K kept tokens, D embedding width.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.distributed import gather_counts, peers, rank, world_size
from pipeline.losses.features import PairFeatures
from pipeline.metric import Cosine, Metric
from pipeline.trainer.random_state import RandomState

Tensors = dict[str, Tensor]
Encoded = tuple[Tensors, Tensors]
Chunk = tuple[Tensor | None, ...]  # images, tokens, image_kept, text_kept, more
Encode = Callable[..., Encoded]
Evaluated = tuple[Tensor, Tensors]

EMBEDS = ("image_embed", "text_embed")
OBJECTIVE = "objective."  # what the names of an objective's own parameters begin with


class Backward(Protocol):
    """Back-propagate; only the last call of a step may reduce gradients over the processes."""

    def __call__(self, loss: Tensor, *, last: bool) -> None: ...


def local_backward(loss: Tensor, *, last: bool) -> None:
    """The backward of one process on its own."""
    loss.backward()


def _loss_parameters(model: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    own = {OBJECTIVE + name: parameter for name, parameter in objective.named_parameters()}
    return {**model.loss_parameters(), **own}


def scalars(model: nn.Module, objective: nn.Module) -> frozenset[str]:
    """Names of the loss's parameters without dimensions, before a strategy gives them one."""
    parameters = _loss_parameters(model, objective)
    return frozenset(name for name, parameter in parameters.items() if parameter.ndim == 0)


def encoded(
    model: nn.Module, objective: nn.Module, chunk: Chunk, scalars: Collection[str]
) -> Encoded:
    """What the forward of the wrapped module returns for a micro-batch: everything with gradient.

    model(*chunk) -> (image_embed, text_embed), or all that it gives of each pair by name, which
    losses find in PairFeatures.extra. Its loss_parameters() and the objective's come out too, so
    that a strategy treats them as it treats the towers: gathered where they are sharded, their
    gradient reduced with the others'. Copies, since a gathered parameter is freed behind the
    forward.
    """
    given = model(*chunk)
    embeddings = dict(given if isinstance(given, Mapping) else zip(EMBEDS, given, strict=True))
    parameters = {
        name: parameter.clone().reshape(()) if name in scalars else parameter.clone()
        for name, parameter in _loss_parameters(model, objective).items()
    }
    return embeddings, parameters


def formula(objective: nn.Module) -> Callable[[PairFeatures, Mapping[str, Tensor]], Evaluated]:
    """The objective as a function of features and of its own parameters, without copying any.

    A strategy hooks the modules it wraps, and under sharding their parameters are pieces; this one
    is evaluated outside, with the parameters that came out of a forward. To be made before a
    strategy wraps the objective.
    """
    tensors = [*objective.parameters(), *objective.buffers()]
    shell = copy.deepcopy(objective, memo={id(tensor): tensor.to("meta") for tensor in tensors})

    def evaluate(features: PairFeatures, parameters: Mapping[str, Tensor]) -> Evaluated:
        tensors = {**dict(objective.named_buffers()), **parameters}
        return torch.func.functional_call(shell, tensors, (features,))

    return evaluate


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _leaf(parts: Sequence[Tensor]) -> Tensor:
    parts = [_at_least_float32(part.detach()) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _surrogate(values: Tensors, gradients: Tensors) -> Tensor:
    """A scalar whose gradient with respect to the values is `gradients`."""
    return sum(
        (_at_least_float32(values[name]) * gradient).sum()
        for name, gradient in gradients.items()
        if values[name].requires_grad
    )


class CachedContrastiveStep:
    """Leaves in the parameters the gradient over all G pairs, for any micro_batch_size.

    encode(images, tokens, image_kept, text_kept) -> (embeddings, parameters), by name: the wrapped
    module's forward, see `encoded`. It runs twice on most pairs and must give the same result: what
    is drawn from a default generator (dropout, stochastic depth) is drawn again, dropped tokens
    come in as indices, and there may be no batch statistics inside.
    loss_scalars(parameters): what the objective is given besides embeddings, by PairFeatures' names
    (logit_scale, logit_bias, curvature).  metric: of the embeddings; None for the cosine.
    objective(features, parameters) -> (total, {term: value}): mean over local pairs, see `formula`.
    micro_batch_size: pairs in one forward; None or B is the ordinary step, other values cost one
    more forward of B - micro_batch_size pairs and hold the activations of one micro-batch. The last
    micro-batch may be smaller.
    backward, session: how the strategy back-propagates (`pipeline.trainer.strategies`), and the
    context around all of a step's backwards. The gradients of the loss's own parameters enter the
    last backward, once.

    A loss that is not finite makes all gradients NaN, on every rank once they are reduced: then all
    can decide alike to skip the step, without asking each other.
    Every rank must bring the same number of pairs to every step. Differing batches in the first
    step raise ValueError on all ranks; later, with several ranks, a rank whose batch changes raises
    before any collective.
    """

    def __init__(
        self,
        *,
        encode: Encode,
        loss_scalars: Callable[[Mapping[str, Tensor]], Tensors],
        objective: Callable[[PairFeatures, Mapping[str, Tensor]], Evaluated],
        micro_batch_size: int | None,
        backward: Backward = local_backward,
        session: Callable[[], AbstractContextManager] = nullcontext,
        metric: Metric | None = None,
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"micro_batch_size {micro_batch_size} is below 1: "
                "set it to the pairs of one forward, or to null for all of them"
            )
        self.encode = encode
        self.loss_scalars = loss_scalars
        self.objective = objective
        self.micro_batch_size = micro_batch_size
        self.backward = backward
        self.session = session
        self.metric = metric or Cosine()
        self._agreed_batch: int | None = None

    def __call__(
        self,
        images: Tensor,
        tokens: Tensor,
        image_kept: Tensor | None = None,
        text_kept: Tensor | None = None,
        *more: Tensor,
    ) -> Tensors:
        """images: (B, ...).  tokens: (B, L).  image_kept, text_kept: (B, K) indices, or None.
        more: (B, ...), whatever else the model's forward takes.

        Adds to the parameters' `.grad`. Returns detached scalars of this rank: "loss", one per
        term, and the loss_scalars.
        """
        chunks = self._chunks(images, tokens, image_kept, text_kept, *more)
        device = images.device
        with self.session():
            embeddings, states = [], []
            with torch.no_grad():
                for chunk in chunks[:-1]:
                    states.append(RandomState.of(device))
                    embeddings.append(self.encode(*chunk)[0])
            # Weights cast by autocast without a graph were reused with one until pytorch#165068
            # (end of 2025), and got no gradient. Delete when we need a torch that has it.
            torch.clear_autocast_cache()
            live, parameters = self.encode(*chunks[-1])
            logged, gradients, own = self._evaluate([*embeddings, live], parameters)
            nothing = {name: torch.zeros_like(gradient) for name, gradient in own.items()}
            # The chunk that kept its graph goes first, which frees it before another is built.
            surrogate = _surrogate(live, gradients[-1])
            del live, embeddings
            for chunk, gradient, state in zip(chunks[:-1], gradients[:-1], states, strict=True):
                # ZeRO 3 adds to the step before what gets a gradient in a later backward only.
                self.backward(surrogate + _surrogate(parameters, nothing), last=False)
                with state.replayed():
                    embeds, parameters = self.encode(*chunk)
                surrogate = _surrogate(embeds, gradient)
                del embeds
            self.backward(surrogate + _surrogate(parameters, own), last=True)
        return logged

    def _evaluate(
        self, parts: Sequence[Tensors], parameters: Tensors
    ) -> tuple[Tensors, list[Tensors], Tensors]:
        """The logged scalars, the loss's gradient for each part, and for each trained parameter."""
        embeddings = {name: _leaf([part[name] for part in parts]) for name in parts[0]}
        values = {name: _leaf([parameter]) for name, parameter in parameters.items()}
        trained = {name: v for name, v in values.items() if parameters[name].requires_grad}
        leaves = [leaf.requires_grad_() for leaf in (*embeddings.values(), *trained.values())]
        own = {n.removeprefix(OBJECTIVE): v for n, v in values.items() if n.startswith(OBJECTIVE)}
        # Under autocast the logits would be bfloat16: at a scale of 100 a step of 0.5 between
        # neighbours.
        with torch.autocast(leaves[0].device.type, enabled=False):
            scalars = self.loss_scalars(values)
            pair = {name: embeddings[name] for name in EMBEDS}
            extra = {name: value for name, value in embeddings.items() if name not in EMBEDS}
            features = PairFeatures(
                **pair, peers=peers(), extra=extra, metric=self.metric, **scalars
            )
            total, terms = self.objective(features, own)
        logged = {"loss": total, **terms, **scalars}
        not_finite = total.detach() * 0  # 0, or NaN
        gradients = [
            gradient + not_finite.to(gradient.dtype)
            for gradient in torch.autograd.grad(total, leaves, materialize_grads=True)
        ]
        sizes = [len(next(iter(part.values()))) for part in parts]
        per_part = zip(*(g.split(sizes) for g in gradients[: len(embeddings)]), strict=True)
        return (
            {name: value.detach() for name, value in logged.items()},
            [dict(zip(embeddings, part, strict=True)) for part in per_part],
            dict(zip(trained, gradients[len(embeddings) :], strict=True)),
        )

    def _chunks(self, *batch: Tensor | None) -> list[Chunk]:
        """What the step was given, cut into micro-batches."""
        counts = [len(rows) for rows in batch if rows is not None]
        if counts[0] == 0 or len(set(counts)) > 1:
            raise ValueError(
                "a step needs at least one pair, and as many images, captions and rows of kept "
                f"tokens: got {counts}"
            )
        self._check_ranks(counts[0], batch[0].device)
        size = self.micro_batch_size or counts[0]
        num_chunks = -(-counts[0] // size)
        split = [[None] * num_chunks if rows is None else rows.split(size) for rows in batch]
        return list(zip(*split, strict=True))

    def _check_ranks(self, local_batch: int, device: torch.device) -> None:
        if world_size() == 1:
            return
        if self._agreed_batch is None:
            batches = gather_counts(local_batch, device)
            if len(set(batches)) > 1:
                raise ValueError(
                    f"local batches differ between ranks: {batches}: every rank must bring "
                    "the same number of pairs, so drop the incomplete last batch"
                )
            self._agreed_batch = local_batch
        elif local_batch != self._agreed_batch:
            raise ValueError(
                f"the local batch changed from {self._agreed_batch} to {local_batch} on rank "
                f"{rank()}: every rank must bring the same number of pairs to every step, so drop "
                "the incomplete last batch"
            )
