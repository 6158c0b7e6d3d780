"""A text is more general than its image: the image lies in the text's cone (MERU, arXiv:2304.09172,
sec. 3.2; EuCLIP, arXiv:2409.13079, sec. 3).
"""

from torch import Tensor, nn

from pipeline.losses.features import PairFeatures


class EntailmentLoss(nn.Module):
    """max(0, exterior angle - half aperture) at each text, of its image; radians, mean over the B
    local pairs. 0 exactly where the image is inside the cone.

    min_radius: K, closer than which to the origin a cone is as wide as it gets.
    eps: added to what is divided by; MERU has 1e-8, EuCLIP 0.
    A term beside a contrastive one: loss=[softmax,entailment] +loss_weights.entailment=0.2.
    Price: nothing beside the logits. Raises ValueError for a metric without cones, as the cosine.
    """

    def __init__(self, *, min_radius: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__()
        if min_radius <= 0 or eps < 0:
            raise ValueError(f"min_radius={min_radius}, eps={eps}: above 0, and at least 0")
        self.min_radius, self.eps = min_radius, eps

    def forward(self, features: PairFeatures) -> Tensor:
        """The scalar of this rank."""
        cone = getattr(features.metric, "cone", None)
        if cone is None:
            raise ValueError(
                f"loss=entailment needs a space with cones and model.metric is "
                f"{features.metric.name}: set metric=euclidean or metric=lorentz"
            )
        angle, aperture = cone(
            features.text_embed, features.image_embed, features.curvature, self.min_radius, self.eps
        )
        return (angle - aperture).clamp(min=0).mean().to(features.image_embed.dtype)
