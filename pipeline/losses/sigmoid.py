"""SigLIP's loss: every image-text pair is a yes-or-no question (arXiv:2303.15343, sec. 3.2).

Letters: B local pairs, G global pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


def logit_bias_of(features: PairFeatures) -> Tensor:
    """The bias, without which a sigmoid starts at G - 1 wrong answers for each right one."""
    if features.logit_bias is None:
        raise ValueError(
            "the sigmoid loss needs a logit bias and the model has none: "
            "set model.init_logit_bias=-10 and model.init_logit_scale=10 (SigLIP), or loss=softmax"
        )
    return features.logit_bias


class SigmoidLoss(nn.Module):
    """-log sigmoid(y (logit_scale similarity(image, text) + logit_bias)), y = 1 for pairs and -1
    for the rest.

    Summed over all G texts, mean over the B local images (the paper divides by G, not G squared);
    after data-parallel averaging value and gradient, the scale's and the bias's included, equal
    those of one process holding all G pairs.
    Price: B x G logits per rank, kept for the backward; `TiledSigmoidLoss` keeps none.
    Raises ValueError if the model has no logit_bias.
    """

    def forward(self, features: PairFeatures) -> Tensor:
        """The scalar of this rank."""
        bias = logit_bias_of(features)
        logits = features.logits(features.image_embed, features.all_text_embed) + bias
        local, total = logits.shape
        own = torch.arange(features.offset, features.offset + local, device=logits.device)
        is_pair = own[:, None] == torch.arange(total, device=logits.device)
        return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum() / local
