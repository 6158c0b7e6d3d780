"""A loss of image and text, for several views of each image (A-CLIP, arXiv:2212.08653, sec. 3.3).

Letters: B local pairs, V views, D embedding width.
"""

from dataclasses import replace

from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


class EachView(nn.Module):
    """The mean of a term over the views: for two, half of each.

    term: a loss of images and texts. Reads extra["other_views"], (B, V - 1, D) unit-norm; the first
    view is image_embed. Reduction and gradient convention are the term's.
    Price: V times the term; the texts are gathered for each view.
    Raises ValueError for a model that gives one view.
    """

    def __init__(self, *, term: nn.Module) -> None:
        super().__init__()
        self.term = term

    def forward(self, features: PairFeatures) -> Tensor:
        others = features.needed("other_views").unbind(1)
        views = [features, *(replace(features, image_embed=other) for other in others)]
        return sum(self.term(view) for view in views) / len(views)
