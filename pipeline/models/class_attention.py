"""Where a tower's class token looks, averaged over blocks and heads (A-CLIP, arXiv:2212.08653,
sec. 3.2).

Letters: B images, N patches, P tokens in front of them, W width, H heads.
"""

import torch
from torch import Tensor

from pipeline.models.vit import VisionTransformer


def class_attention(tower: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """images: (B, 3, S, S). Returns features (B, W), as the tower gives them, and the class
    token's attention to the patches (B, N): the mean over all blocks and heads of the softmax over
    all tokens. Whole images; neither has a gradient.

    Price: in each block one row of the attention more; the rest stays the fused kernel's.
    Raises ValueError for a tower without a class token.
    """
    if tower.num_prefix == 0:
        raise ValueError(
            "attentive masking reads a class token's attention and this image tower has none: set "
            "model.image.class_token=true, or image_tokens=random"
        )
    rotary = None if tower.rotary is None else tower.rotary(None)
    rows: list[Tensor] = []
    hooks = []
    for block in tower.transformer.blocks:
        attention = block.attention

        def read(_: object, __: object, projected: Tensor, attention=attention) -> None:
            query, key, _ = attention.split(projected, rotary)
            scores = query[:, :, :1] @ key.mT / query.shape[-1] ** 0.5
            row = scores.softmax(dim=-1)[:, :, 0, tower.num_prefix :]
            rows.append(row.to(torch.promote_types(row.dtype, torch.float32)).mean(dim=1))

        hooks.append(attention.qkv.register_forward_hook(read))
    try:
        with torch.no_grad():
            features = tower(images)
    finally:
        for hook in hooks:
            hook.remove()
    return features, torch.stack(rows).mean(dim=0)
