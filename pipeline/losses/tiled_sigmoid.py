"""SigLIP's loss without a logit matrix: computed in tiles, again in the backward.

Letters: B local pairs, G global pairs, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.distributed import Peers
from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import logit_bias_of
from pipeline.losses.tiles import (
    check_options,
    choose_kernels,
    in_full,
    tiles_of,
    without_autocast,
)


class _SigmoidLosses(torch.autograd.Function):
    """The sum of each local image's G losses; texts pass around the ring."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        peers: Peers,
        tile: int | None,
        backend: str,
    ) -> Tensor:
        ctx.options = peers, tile, backend
        kernels = choose_kernels(backend, image.device, image.dtype)
        with without_autocast(image.device):
            rows, columns = (image * scale).contiguous(), text.contiguous()
            losses = rows.new_zeros(len(rows))
            for owner, (block,) in peers.ring(columns):
                for r, c in tiles_of(rows, tile):
                    own = owner == peers.rank and r == c
                    losses[r] += kernels.sigmoid_losses(rows[r], block[c], bias, own=own)
        ctx.save_for_backward(image, text, scale, bias)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, bias = ctx.saved_tensors
        peers, tile, backend = ctx.options
        kernels = choose_kernels(backend, image.device, image.dtype)
        with without_autocast(image.device):
            rows, columns = (image * scale).contiguous(), text.contiguous()
            weighted_rows = rows * weight[:, None]
            image_grad, bias_grad = torch.zeros_like(rows), torch.zeros_like(weight)

            def visit(owner: int, columns: Tensor) -> Tensor:
                grad = torch.zeros_like(columns)
                for r, c in tiles_of(rows, tile):
                    own = owner == peers.rank and r == c
                    weights = kernels.sigmoid_weights(rows[r], columns[c], bias, own=own)
                    image_grad[r].addmm_(weights, columns[c])
                    grad[c].addmm_(weights.T, weighted_rows[r])
                    bias_grad[r] += weights.sum(1)
                return grad

            text_grad = peers.carry((columns,), visit, torch.add)
            image_grad *= weight[:, None]
            # The logits less the bias are linear in the scale.
            scale_grad = (image_grad * image).sum()
            image_grad *= scale
            bias_grad = bias_grad @ weight
        return image_grad, text_grad, scale_grad, bias_grad, None, None, None


class TiledSigmoidLoss(nn.Module):
    """What `SigmoidLoss` computes, in memory that grows with B instead of B x G.

    Sum over all G texts, mean over the B local images; after data-parallel averaging value and
    gradient, the scale's and the bias's included, equal those of one process holding all G pairs.
    tile, backend: as in `TiledSoftmaxLoss`. bfloat16 and float16 are computed in float32.
    Price: 4 matrix products where the dense loss needs 3; the backward keeps the embeddings alone.
    One ring of text blocks in the forward, and one of text blocks and their gradients in the
    backward, both while tiles are computed.
    Raises ValueError for tile < 1, an unknown backend, and if the model has no logit_bias.
    """

    def __init__(self, *, tile: int | None = None, backend: str = "auto") -> None:
        super().__init__()
        check_options(tile=tile, backend=backend)
        self.tile = tile
        self.backend = backend

    def forward(self, features: PairFeatures) -> Tensor:
        """The scalar of this rank."""
        features.check_inner("tiled_sigmoid")
        inputs = in_full(
            features.image_embed,
            features.text_embed,
            features.logit_scale,
            logit_bias_of(features),
        )
        return _SigmoidLosses.apply(*inputs, features.peers, self.tile, self.backend).mean()
