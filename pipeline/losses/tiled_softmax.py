"""CLIP's symmetric softmax loss without a logit matrix: computed in tiles, again in the backward.

Letters: B local pairs, G global pairs, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.distributed import Peers
from pipeline.losses.features import PairFeatures
from pipeline.losses.softmax import check_label_smoothing
from pipeline.losses.tiles import (
    check_options,
    choose_kernels,
    in_full,
    tiles_of,
    without_autocast,
)


class _LogSumExps(torch.autograd.Function):
    """log sum exp over each local row and each local column of the G x G logits, and the logits
    where they cross.

    A rank computes its images against all texts. Texts pass around the ring and take along the log
    sum exp over the images they have met; in the backward they take their gradient home. So each
    logit is computed once in the forward and once in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        peers: Peers,
        tile: int | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.options = peers, tile, backend
        kernels = choose_kernels(backend, image.device, image.dtype)
        with without_autocast(image.device):
            rows, columns = (image * scale).contiguous(), text.contiguous()
            image_lse = rows.new_full(rows.shape[:1], -torch.inf)
            own_logit = torch.empty_like(image_lse)

            def visit(owner: int, columns: Tensor) -> Tensor:
                column_lse = torch.full_like(image_lse, -torch.inf)
                for r, c in tiles_of(rows, tile):
                    own = owner == peers.rank and r == c
                    over_columns, over_rows, diagonal = kernels.log_sum_exps(
                        rows[r], columns[c], own=own
                    )
                    if own:
                        own_logit[r] = diagonal
                    torch.logaddexp(image_lse[r], over_columns, out=image_lse[r])
                    torch.logaddexp(column_lse[c], over_rows, out=column_lse[c])
                return column_lse

            text_lse = peers.carry((columns,), visit, torch.logaddexp)
        ctx.save_for_backward(image, text, scale, image_lse, text_lse)
        return image_lse, text_lse, own_logit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, image_weight: Tensor, text_weight: Tensor, own_weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, text, scale, image_lse, text_lse = ctx.saved_tensors
        peers, tile, backend = ctx.options
        kernels = choose_kernels(backend, image.device, image.dtype)
        with without_autocast(image.device):
            rows, columns = (image * scale).contiguous(), text.contiguous()
            image_grad = torch.zeros_like(rows)
            image_weight, text_weight = image_weight.contiguous(), text_weight.contiguous()

            def visit(owner: int, columns: Tensor, lse: Tensor, weight: Tensor) -> Tensor:
                grad = torch.zeros_like(columns)
                for r, c in tiles_of(rows, tile):
                    weights = kernels.softmax_weights(
                        rows[r], columns[c], image_lse[r], lse[c], image_weight[r], weight[c]
                    )
                    if owner == peers.rank and r == c:
                        weights.diagonal().add_(own_weight[r])
                    image_grad[r].addmm_(weights, columns[c])
                    grad[c].addmm_(weights.T, rows[r])
                return grad

            block = (columns, text_lse, text_weight)
            text_grad = peers.carry(block, visit, torch.add)
            # The logits are linear in the scale, so its gradient is sum(weights * logits) / scale.
            scale_grad = (image_grad * image).sum()
            image_grad *= scale
        return image_grad, text_grad, scale_grad, None, None, None


class TiledSoftmaxLoss(nn.Module):
    """What `SoftmaxLoss` computes, in memory that grows with B instead of B x G.

    Mean over the B local rows; after data-parallel averaging value and gradient, the scale's
    included, equal those of one process holding all G pairs. A rank's own scale gradient is not
    that of its own value: only their means over ranks agree.
    label_smoothing: as in `SoftmaxLoss`.
    tile: rows and columns of the square of logits that exists at a time; None for 1,024 on a CPU
    and 4,096 on a GPU. The result does not depend on it but for rounding.
    backend: auto, torch or triton (see `choose_kernels`).
    bfloat16 and float16 embeddings are computed in float32.
    Price: 4 matrix products where the dense loss on one rank needs 3 (on several, 6); the backward
    keeps the embeddings and two numbers a pair. One ring of text blocks in the forward, and one of
    text blocks and their gradients in the backward, both while tiles are computed.
    Raises ValueError unless 0 <= label_smoothing < 1 and tile >= 1, and for an unknown backend.
    """

    def __init__(
        self, *, label_smoothing: float = 0.0, tile: int | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        check_label_smoothing(label_smoothing)
        check_options(tile=tile, backend=backend)
        self.label_smoothing = label_smoothing
        self.tile = tile
        self.backend = backend

    def forward(self, features: PairFeatures) -> Tensor:
        """The scalar of this rank."""
        features.check_inner("tiled_softmax")
        image, text, scale = in_full(
            features.image_embed, features.text_embed, features.logit_scale
        )
        image_lse, text_lse, own = _LogSumExps.apply(
            image, text, scale, features.peers, self.tile, self.backend
        )
        # Row by row: at a scale of 100 the two means would be large, and their difference small.
        loss = ((image_lse - own) + (text_lse - own)).mean() / 2
        if self.label_smoothing:
            spread = scale * _mean_product(image, text, features.peers)
            loss = loss + self.label_smoothing * (own.mean() - spread)
        return loss


def _mean_product(image: Tensor, text: Tensor, peers: Peers) -> Tensor:
    """Of the local images with all texts and of the local texts with all images."""
    means = torch.stack([image.mean(0), text.mean(0)])
    of_all = peers.gather(means[None]).mean(0)
    return (means * of_all.flip(0)).sum() / 2
