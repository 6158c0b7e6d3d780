"""Each view predicts what an averaged tower makes of the image (BYOL, arXiv:2006.07733, eq. 2).

Letters: B local pairs, V views, D embedding width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


class ByolLoss(nn.Module):
    """2 - 2 cos(prediction, target), in [0, 4].

    Reads extra["predicted"], (B, V, D), and extra["target"], (B, D), both of any length; the target
    is data, whatever gradient it asks for.
    Mean over views and local pairs, so data-parallel averaging gives the gradient of one process
    holding all pairs. Without negatives: a collapse shows as a loss near 0 and is kept off by the
    predictor and the slow target alone.
    Raises ValueError for a model that gives neither.
    """

    def forward(self, features: PairFeatures) -> Tensor:
        predicted, target = features.needed("predicted"), features.needed("target").detach()
        return 2 - 2 * F.cosine_similarity(predicted, target.unsqueeze(1), dim=-1).mean()
