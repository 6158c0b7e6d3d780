"""CLIP's symmetric softmax loss, InfoNCE in both directions (arXiv:2103.00020, fig. 3).

Letters: B local pairs, G global pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


class SoftmaxLoss(nn.Module):
    """Each local image against all G texts and each local text against all G images, halved.

    Mean over the B local rows; after data-parallel averaging value and gradient, the scale's
    included, equal those of one process holding all G pairs.
    Price: two B x G logit matrices and their softmax per rank (one matrix if this rank holds all
    pairs).
    """

    def forward(self, features: PairFeatures) -> Tensor:
        scaled_image_embed = features.logit_scale * features.image_embed
        image_logits = scaled_image_embed @ features.all_text_embed.T
        local, total = image_logits.shape
        if local == total:
            text_logits = image_logits.T
        else:
            text_logits = (features.logit_scale * features.text_embed) @ features.all_image_embed.T
        own = torch.arange(features.offset, features.offset + local, device=image_logits.device)
        return (F.cross_entropy(image_logits, own) + F.cross_entropy(text_logits, own)) / 2
