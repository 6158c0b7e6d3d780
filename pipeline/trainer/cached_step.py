"""One optimizer step's backward, for a loss over more pairs than the towers hold at once.

Gradient caching (GradCache, arXiv:2101.06983): the loss is evaluated once on the embeddings of all
pairs; its gradient with respect to the embeddings is then all that a micro-batch needs for its own
backward.
Letters: B local pairs, G global pairs, L text positions, K kept tokens, D embedding width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed import gather_counts, peers, rank, world_size
from pipeline.losses.features import PairFeatures

Embeddings = tuple[Tensor, Tensor]
Chunk = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Encode = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Embeddings]


def ddp_backward(model: DistributedDataParallel) -> Callable[[Tensor], None]:
    """A backward that reduces gradients unless called in model.no_sync(), wherever the forward was.

    DistributedDataParallel arms its reducer at the end of a forward outside no_sync(); the cached
    step runs every forward inside it, and this arms the reducer right before the one backward that
    reduces.
    """

    def backward(loss: Tensor) -> None:
        if model.require_backward_grad_sync:
            model.reducer._rebuild_buckets()
            model.reducer.prepare_for_backward([loss] if model.find_unused_parameters else [])
        loss.backward()

    return backward


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _leaf(parts: Sequence[Tensor]) -> Tensor:
    parts = [_at_least_float32(part.detach()) for part in parts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).requires_grad_()


def _surrogate(embeddings: Embeddings, gradients: Embeddings) -> Tensor:
    """A scalar whose gradient with respect to the embeddings is `gradients`."""
    return sum(
        (_at_least_float32(embed) * gradient).sum()
        for embed, gradient in zip(embeddings, gradients, strict=True)
    )


class CachedContrastiveStep:
    """Leaves in the parameters the gradient over all G pairs, for any micro_batch_size.

    encode(images, tokens, image_kept, text_kept) -> (image_embed, text_embed): the towers. It runs
    twice on most pairs and must give the same result: dropped tokens come in as indices, and there
    may be no dropout or batch statistics inside.
    loss_parameters: what the objective reads besides embeddings; their gradient enters the last
    backward once.
    loss_scalars(): what the objective is given besides embeddings, by PairFeatures' names
    (logit_scale, logit_bias): functions of loss_parameters.
    objective(features) -> (total, {term: value}): mean over local pairs (see `pipeline.losses`).
    micro_batch_size: pairs in one forward; None or B is the ordinary step, other values cost one
    more forward of B - micro_batch_size pairs and hold the activations of one micro-batch. The last
    micro-batch may be smaller.
    backward, no_sync: how the strategy back-propagates, and the context in which it does not
    reduce. All forwards run inside no_sync and only the last backward outside, so gradients are
    reduced once; `backward` must be able to reduce for a forward that ran inside (`ddp_backward`,
    or Lightning's manual_backward).

    Every rank must bring the same number of pairs to every step. Differing batches in the first
    step raise ValueError on all ranks; later, with several ranks, a rank whose batch changes raises
    before any collective.
    """

    def __init__(
        self,
        *,
        encode: Encode,
        loss_parameters: dict[str, nn.Parameter],
        loss_scalars: Callable[[], dict[str, Tensor]],
        objective: Callable[[PairFeatures], tuple[Tensor, dict[str, Tensor]]],
        micro_batch_size: int | None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"micro_batch_size {micro_batch_size} is below 1: "
                "set it to the pairs of one forward, or to null for all of them"
            )
        self.encode = encode
        self.loss_parameters = loss_parameters
        self.loss_scalars = loss_scalars
        self.objective = objective
        self.micro_batch_size = micro_batch_size
        self.backward = backward
        self.no_sync = no_sync
        self._agreed_batch: int | None = None

    def __call__(
        self,
        images: Tensor,
        tokens: Tensor,
        image_kept: Tensor | None = None,
        text_kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """images: (B, ...).  tokens: (B, L).  image_kept, text_kept: (B, K) indices, or None.

        Adds to the parameters' `.grad`. Returns detached scalars of this rank: "loss", one per
        term, and the loss_scalars.
        """
        trained = [p for p in self.loss_parameters.values() if p.requires_grad]
        chunks = self._chunks(images, tokens, image_kept, text_kept)
        with self.no_sync():
            with torch.no_grad():
                embeddings = [self.encode(*chunk) for chunk in chunks[:-1]]
            # Weights cast by autocast without a graph were reused with one until pytorch#165068
            # (end of 2025), and got no gradient. Delete when we need a torch that has it.
            torch.clear_autocast_cache()
            live = self.encode(*chunks[-1])
            logged, gradients, loss_gradients = self._evaluate([*embeddings, live], trained)
            # The chunk that kept its graph goes first, which frees it before another is built.
            surrogate = _surrogate(live, gradients[-1])
            del live
            for chunk, gradient in zip(chunks[:-1], gradients[:-1], strict=True):
                self.backward(surrogate)
                surrogate = _surrogate(self.encode(*chunk), gradient)
        for parameter, gradient in zip(trained, loss_gradients, strict=True):
            surrogate = surrogate + (parameter * gradient).sum()
        self.backward(surrogate)
        return logged

    def _evaluate(
        self, parts: Sequence[Embeddings], trained: Sequence[nn.Parameter]
    ) -> tuple[dict[str, Tensor], list[Embeddings], list[Tensor]]:
        """The logged scalars, the loss's gradient for each part, and for each trained parameter."""
        leaves = tuple(_leaf(embeds) for embeds in zip(*parts, strict=True))
        image_embed, text_embed = leaves
        # Under autocast the logits would be bfloat16: at a scale of 100 a step of 0.5 between
        # neighbours.
        with torch.autocast(image_embed.device.type, enabled=False):
            scalars = self.loss_scalars()
            features = PairFeatures(
                image_embed=image_embed,
                text_embed=text_embed,
                peers=peers(),
                **scalars,
            )
            total, values = self.objective(features)
        gradients = torch.autograd.grad(total, [*leaves, *trained], materialize_grads=True)
        logged = {"loss": total, **values, **scalars}
        sizes = [len(part[0]) for part in parts]
        per_part = list(zip(*(gradient.split(sizes) for gradient in gradients[:2]), strict=True))
        return {name: value.detach() for name, value in logged.items()}, per_part, gradients[2:]

    def _chunks(self, *batch: Tensor | None) -> list[Chunk]:
        """images, tokens, image_kept, text_kept, cut into micro-batches."""
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
