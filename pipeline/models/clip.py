"""Two towers, two projections and a temperature (CLIP, arXiv:2103.00020, fig. 3).

Letters: B pairs, L text positions, K kept tokens, D embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _unit_norm(features: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least: bfloat16 keeps three digits of a similarity."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


class CLIP(nn.Module):
    """A pair of encoders into one unit sphere.

    image, text: towers with `.width` and forward(inputs, kept) -> (B, width).

    The learned temperature is the parameter `log_logit_scale`; `logit_scale` is the positive
    factor. init_logit_bias: adds a learned `logit_bias` to every logit (SigLIP, arXiv:2303.15343,
    sec. 3.2: -10); None for none.
    Raises ValueError unless 1 <= init_logit_scale <= max_logit_scale.
    """

    def __init__(
        self,
        *,
        image: nn.Module,
        text: nn.Module,
        embed_dim: int,
        init_logit_scale: float = 1 / 0.07,  # CLIP sec. 2.5
        max_logit_scale: float = 100.0,  # CLIP sec. 2.5: a larger factor made training unstable
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= init_logit_scale <= max_logit_scale:
            raise ValueError(
                f"init_logit_scale {init_logit_scale} is outside "
                f"[1, max_logit_scale={max_logit_scale}]"
            )
        self.image = image
        self.text = text
        self.max_log_logit_scale = math.log(max_logit_scale)
        self.image_projection = nn.Linear(image.width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, embed_dim, bias=False)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(init_logit_scale)))
        self.logit_bias = (
            None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))
        )

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W) float, normalised. kept: (B, K) patches. Returns (B, D)."""
        return _unit_norm(self.image_projection(self.image(images, kept)))

    def encode_text(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """tokens: (B, L) int64. kept: (B, K) ascending positions. Returns (B, D)."""
        return _unit_norm(self.text_projection(self.text(tokens, kept)))

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
        # The log is clamped and not its exponential: exp(ln 100) may round above 100, and the
        # clamp's gradient would then be zero at the bound for good.
        return self.log_logit_scale.clamp(max=self.max_log_logit_scale).exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Put log_logit_scale back into [0, ln(max_logit_scale)], after every optimizer step."""
        self.log_logit_scale.clamp_(0.0, self.max_log_logit_scale)

    def loss_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the loss reads directly, not through a tower."""
        known = {"log_logit_scale": self.log_logit_scale, "logit_bias": self.logit_bias}
        return {name: parameter for name, parameter in known.items() if parameter is not None}

    def loss_scalars(self) -> dict[str, Tensor]:
        """What losses are given of them, by the names of PairFeatures."""
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {"logit_scale": self.logit_scale, **bias}
