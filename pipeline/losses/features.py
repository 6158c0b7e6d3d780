"""What every loss term is given: this rank's embeddings and those of all ranks.

Letters: B local pairs, G global pairs, D embedding width.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PairFeatures:
    """image_embed, text_embed: (B, D) unit-norm, row i of both is one pair, rank-local.

    all_image_embed, all_text_embed: (G, D), rows in rank order, with gradient to the owning rank.
    offset: index of the first local row among the G.  logit_scale: scalar, positive.
    """

    image_embed: Tensor
    text_embed: Tensor
    all_image_embed: Tensor
    all_text_embed: Tensor
    offset: int
    logit_scale: Tensor
