"""CLIP that sees several views of an image and learns from them without their caption as well.

Letters: B pairs, V views, K kept patches, W tower width, D embedding width, P projection width.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipeline.metric import unit_norm
from pipeline.models.class_attention import class_attention
from pipeline.models.clip import CLIP

VIEWS = 2  # that pipeline.data.three_views gives, beside the wide crop


def head(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with a norm and a ReLU between them.

    SimCLR, BYOL and A-CLIP have batch norms there; a step in micro-batches, and on several ranks,
    needs a norm of each row on its own (BYOL does without the batch's: arXiv:2010.10241).
    """
    layers: list[nn.Module] = []
    for number, (width, out) in enumerate(pairwise(widths), 1):
        layers.append(nn.Linear(width, out, bias=bias))
        if number < len(widths) - 1:
            layers += [nn.LayerNorm(out), nn.ReLU()]
    return nn.Sequential(*layers)


class ViewsCLIP(CLIP):
    """CLIP with A-CLIP's heads (arXiv:2212.08653, sec. 3.3) on the image tower's features.

    hidden_ratio: their hidden width as a multiple of W, rounded. projection_width: P.
    `ssl_head` (three layers) is SimCLR's, `projector` and `predictor` (two each) BYOL's. Everything
    else: see CLIP. Evaluation and export have no use for the heads.
    """

    training_only = ("ssl_head", "projector", "predictor")

    def __init__(
        self,
        *,
        image: nn.Module,
        text: nn.Module,
        embed_dim: int,
        hidden_ratio: float = 16 / 3,  # A-CLIP: 4096 for a width of 768
        projection_width: int = 256,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        image_projection: str = "linear",
        text_projection: str = "linear",
    ) -> None:
        super().__init__(
            image=image,
            text=text,
            embed_dim=embed_dim,
            init_logit_scale=init_logit_scale,
            max_logit_scale=max_logit_scale,
            image_projection=image_projection,
            text_projection=text_projection,
        )
        hidden = round(hidden_ratio * image.width)
        if hidden < 1 or projection_width < 1:
            raise ValueError(
                f"hidden_ratio {hidden_ratio} and projection_width {projection_width}: the heads "
                "need at least one unit in every layer"
            )
        self.ssl_head = head(image.width, hidden, hidden, projection_width)
        self.projector = head(image.width, hidden, projection_width, bias=False)
        self.predictor = head(projection_width, hidden, projection_width, bias=False)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        image_kept: Tensor | None = None,
        text_kept: Tensor | None = None,
        target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """images: (B, V, 3, S, S). image_kept: (B, V, K). target: (B, P), what the averaged tower
        made of each image.

        Returns by name what `encode_views` does, text_embed (B, D), and target as it came.
        """
        views = self.encode_views(images, image_kept)
        found = {**views, "text_embed": self.encode_text(tokens, text_kept)}
        return found if target is None else found | {"target": target}

    def encode_views(self, images: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
        """By name image_embed (B, D) of the first view, other_views (B, V - 1, D), ssl_embed
        (B, V, P), predicted (B, V, P).
        """
        views = images.shape[1]
        features = self.image(images.flatten(0, 1), None if kept is None else kept.flatten(0, 1))
        embed = unit_norm(self.image_projection(features)).unflatten(0, (-1, views))
        features = features.unflatten(0, (-1, views))
        return {
            "image_embed": embed[:, 0],
            "other_views": embed[:, 1:],
            "ssl_embed": self.ssl_head(features),
            "predicted": self.predictor(self.projector(features)),
        }

    def image_parts(self) -> nn.ModuleList:
        """What follows the image tower in training."""
        return nn.ModuleList([self.image_projection, self.ssl_head, self.projector, self.predictor])


class Teacher(nn.Module):
    """What an averaged model says about images: where its class token looks, and BYOL's target.

    A shell around a ViewsCLIP's image tower and projector, to be called with other weights
    (torch.func.functional_call).
    """

    def __init__(self, model: ViewsCLIP) -> None:
        super().__init__()
        self.image, self.projector = model.image, model.projector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, S, S). Returns attention (B, N) and target (B, P), without gradient."""
        features, attention = class_attention(self.image, images)
        with torch.no_grad():
            return attention, self.projector(features)

    def named(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a model's weights that are the teacher's."""
        return {
            name: weight
            for name, weight in weights.items()
            if name.startswith(("image.", "projector."))
        }
