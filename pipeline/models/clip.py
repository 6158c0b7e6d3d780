"""Two towers, two projections and a temperature (CLIP, arXiv:2103.00020, fig. 3).

Letters: B pairs, L text positions, K kept tokens, D embedding width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.metric import Cosine, Metric


def _projection(kind: str, width: int, embed_dim: int, name: str) -> nn.Module:
    if kind not in PROJECTIONS:
        raise ValueError(f"unknown {name} {kind!r}: one of {sorted(PROJECTIONS)}")
    if kind == "none":
        if width != embed_dim:
            raise ValueError(
                f"{name}=none needs a tower of width {embed_dim} (embed_dim), not {width}"
            )
        return nn.Identity()
    return nn.Linear(width, embed_dim, bias=kind == "biased")


PROJECTIONS = ("linear", "biased", "none")


class CLIP(nn.Module):
    """A pair of encoders into one space.

    image, text: towers with `.width` and forward(inputs, kept) -> (B, width).
    image_projection, text_projection: "linear" (CLIP), "biased" (a linear layer with bias), or
    "none" for a tower that is embed_dim wide (SigLIP's image tower).

    metric: of the space (pipeline/metric.py); None for the cosine on the unit sphere. A curved one
    gives the model a learned curvature, and a learned factor, at most 1 and at first D^-1/2, of
    each modality's projections (MERU, arXiv:2304.09172, app. A).
    The learned temperature is the parameter `log_logit_scale`; `logit_scale` is the positive
    factor. init_logit_bias: adds a learned `logit_bias` to every logit (SigLIP, arXiv:2303.15343,
    sec. 3.2: -10); None for none.
    Raises ValueError unless 0 < min_logit_scale <= init_logit_scale <= max_logit_scale.
    """

    training_only: tuple[str, ...] = ()  # parts that evaluation and export have no use for

    def __init__(
        self,
        *,
        image: nn.Module,
        text: nn.Module,
        embed_dim: int,
        init_logit_scale: float = 1 / 0.07,  # CLIP sec. 2.5
        min_logit_scale: float = 1.0,
        max_logit_scale: float = 100.0,  # CLIP sec. 2.5: a larger factor made training unstable
        init_logit_bias: float | None = None,
        image_projection: str = "linear",
        text_projection: str = "linear",
        metric: Metric | None = None,
    ) -> None:
        super().__init__()
        if not 0 < min_logit_scale <= init_logit_scale <= max_logit_scale:
            raise ValueError(
                f"init_logit_scale {init_logit_scale} is outside "
                f"[min_logit_scale={min_logit_scale:g}, max_logit_scale={max_logit_scale}], and "
                "both are above 0"
            )
        self.image = image
        self.text = text
        self.embed_dim = embed_dim
        self.metric = metric or Cosine()
        self.min_log_logit_scale = math.log(min_logit_scale)
        self.max_log_logit_scale = math.log(max_logit_scale)
        self.init_logit_scale, self.init_logit_bias = init_logit_scale, init_logit_bias
        self.image_projection = _projection(
            image_projection, image.width, embed_dim, "image_projection"
        )
        self.text_projection = _projection(
            text_projection, text.width, embed_dim, "text_projection"
        )
        self.log_logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.empty(()))
        for name in ("log_curvature", "log_image_factor", "log_text_factor"):
            setattr(self, name, nn.Parameter(torch.empty(())) if self.metric.curved else None)
        self.initialise()

    def initialise(self) -> None:
        """First values of what is not in a tower."""
        for projection in (self.image_projection, self.text_projection):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        nn.init.constant_(self.log_logit_scale, math.log(self.init_logit_scale))
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.init_logit_bias)
        if self.metric.curved:
            nn.init.constant_(self.log_curvature, math.log(self.metric.init_curvature))
            for factor in (self.log_image_factor, self.log_text_factor):
                nn.init.constant_(factor, -0.5 * math.log(self.embed_dim))

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W) float, normalised. kept: (B, K) patches. Returns (B, D)."""
        return self.placed_image(self.image_projection(self.image(images, kept)))

    def encode_text(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """tokens: (B, L) int64. kept: (B, K) ascending positions. Returns (B, D)."""
        return _placed(
            self.metric, self.text_projection(self.text(tokens, kept)), self.log_text_factor
        )

    def placed_image(self, projected: Tensor) -> Tensor:
        """(B, D) projections of the image tower -> its embeddings."""
        return _placed(self.metric, projected, self.log_image_factor)

    def similarity(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(..., N, D), (..., M, D) embeddings -> (..., N, M) by the model's metric, on their
        device, without gradient.
        """
        curvature = self.curvature
        if curvature is not None:
            curvature = curvature.detach().to(queries.device)
        return self.metric.similarity(queries, candidates, curvature)

    @property
    def curvature(self) -> Tensor | None:
        """Of a curved metric, positive: the space's is its negative."""
        return self.loss_scalars(self.loss_parameters()).get("curvature")

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        image_kept: Tensor | None = None,
        text_kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.encode_image(images, image_kept), self.encode_text(tokens, text_kept)

    @property
    def logit_scale(self) -> Tensor:
        """exp(log_logit_scale), at most max_logit_scale; a scalar with gradient."""
        return self.loss_scalars(self.loss_parameters())["logit_scale"]

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """(parameter, least, most), to be put back into after every optimizer step."""
        found = [(self.log_logit_scale, self.min_log_logit_scale, self.max_log_logit_scale)]
        if self.metric.curved:
            low, high = map(math.log, self.metric.bounds)
            found.append((self.log_curvature, low, high))
            found += [(f, -math.inf, 0.0) for f in (self.log_image_factor, self.log_text_factor)]
        return found

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Put the bounded parameters back into their bounds, after every optimizer step."""
        for parameter, least, most in self.bounds():
            parameter.clamp_(least, most)

    def loss_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the loss reads directly, not through a tower."""
        names = ("log_logit_scale", "logit_bias", "log_curvature")
        known = {name: getattr(self, name) for name in names}
        return {name: parameter for name, parameter in known.items() if parameter is not None}

    def loss_scalars(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What losses are given of the loss_parameters, by the names of PairFeatures.

        parameters: their values; where they are sharded, what came out of a forward.
        """
        # The log is clamped and not its exponential: exp(ln 100) may round above 100, and the
        # clamp's gradient would then be zero at the bound for good.
        log_scale = parameters["log_logit_scale"].clamp(max=self.max_log_logit_scale)
        found = {name: value for name, value in parameters.items() if name == "logit_bias"}
        if "log_curvature" in parameters:
            found["curvature"] = parameters["log_curvature"].exp()
        return {"logit_scale": log_scale.exp(), **found}


def _placed(metric: Metric, projected: Tensor, log_factor: Tensor | None) -> Tensor:
    placed = metric.place(projected)
    return placed if log_factor is None else placed * log_factor.exp()
