"""Two views of an image find each other among all others (SimCLR, arXiv:2002.05709, eq. 1).

Letters: B local pairs, G global pairs, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


class SimCLRLoss(nn.Module):
    """Each local view against the 2 G - 1 other views of all images; its own image's is the right
    one.

    Reads extra["ssl_embed"], (B, 2, D), of any length. temperature: SimCLR's tau; A-CLIP
    (arXiv:2212.08653) and SLIP have 0.1.
    Mean over the 2 B local views; after data-parallel averaging value and gradient equal those of
    one process holding all G pairs.
    Price: four B x G matrices and their softmax, and two gathers.
    Raises ValueError unless temperature > 0, for a model without that embedding, or more than two
    views.
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: SimCLR needs one above 0")
        self.temperature = temperature

    def forward(self, features: PairFeatures) -> Tensor:
        embed = F.normalize(features.needed("ssl_embed"), dim=-1)
        if embed.shape[1] != 2:
            raise ValueError(f"{embed.shape[1]} views of an image: SimCLR compares two")
        views = embed.unbind(1)
        gathered = [features.peers.gather(view) for view in views]
        local, total = len(embed), len(gathered[0])
        row = torch.arange(local, device=embed.device)
        own = features.offset + row
        itself = F.one_hot(own, total).bool()
        losses = []
        for view, same, other in zip(views, gathered, reversed(gathered), strict=True):
            strangers = (view @ same.T / self.temperature).masked_fill(itself, float("-inf"))
            logits = torch.cat([view @ other.T / self.temperature, strangers], dim=1)
            losses.append(F.cross_entropy(logits, own))
        return sum(losses) / 2
