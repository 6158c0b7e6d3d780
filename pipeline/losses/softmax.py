"""CLIP's symmetric softmax loss, InfoNCE in both directions (arXiv:2103.00020, fig. 3).

Letters: B local pairs, G global pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises ValueError outside [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing} is outside [0, 1)")


class SoftmaxLoss(nn.Module):
    """Each local image against all G texts and each local text against all G images, halved.

    Mean over the B local rows; after data-parallel averaging value and gradient, the scale's
    included, equal those of one process holding all G pairs.
    label_smoothing: share e of each target that is spread evenly over all G (arXiv:1512.00567, sec.
    7): 1 - e + e/G on the own pair, e/G elsewhere. Where captions repeat, some of a batch's
    negatives are none; a little smoothing stops the model from insisting on them. CLIP has 0.
    Price: two B x G logit matrices and their softmax per rank (one matrix if this rank holds all
    pairs), kept for the backward; `TiledSoftmaxLoss` keeps none.
    Raises ValueError unless 0 <= label_smoothing < 1.
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, features: PairFeatures) -> Tensor:
        """The scalar of this rank."""
        image_logits = features.logits(features.image_embed, features.all_text_embed)
        local, total = image_logits.shape
        if local == total:
            text_logits = image_logits.T
        else:
            text_logits = features.logits(features.text_embed, features.all_image_embed)
        own = torch.arange(features.offset, features.offset + local, device=image_logits.device)
        losses = [
            F.cross_entropy(logits, own, label_smoothing=self.label_smoothing)
            for logits in (image_logits, text_logits)
        ]
        return sum(losses) / 2
