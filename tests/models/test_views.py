import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.class_attention import class_attention
from pipeline.models.text import TextTransformer
from pipeline.models.transformer import BlockStyle
from pipeline.models.views import Teacher, ViewsCLIP
from pipeline.models.vit import VisionTransformer
from pipeline.models.without_weights import without_weights

STYLES = {
    "plain": {},
    "rotary": {"rotary_grid": 3},
    "no class pooling": {"pooling": "mean"},
    "normed, post": {"block": BlockStyle(norm_place="after", qk_norm=True, qkv_bias="query_value")},
}


def tower(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"image_size": 12, "patch_size": 4, "width": 16, "layers": 3, "heads": 2}
    model = VisionTransformer(**(options | changes)).double()
    if model.rotary is not None:
        model.rotary.initialise()  # once more, in this type
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def pictures(count: int = 3, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, 3, 12, 12, generator=generator, dtype=torch.float64)


def written_out(model: VisionTransformer, images: Tensor) -> Tensor:
    """Every block's whole score matrix, head by head, averaged at the end."""
    found, rotary = [], None if model.rotary is None else model.rotary(None)
    x = model.embed(images)
    for block in model.transformer.blocks:
        after = isinstance(block, nn.Module) and type(block).__name__ == "PostNormBlock"
        query, key, value = block.attention.heads_of(x if after else block.norm_1(x), rotary)
        scores = torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(query.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        found.append(weights[:, :, 0, 1:])
        mixed = block.attention.out(torch.einsum("bhnm,bhmd->bnhd", weights, value).flatten(2))
        if after:
            x = x + block.norm_1(mixed)
            x = x + block.norm_2(block.mlp(x))
        else:
            x = x + mixed
            x = x + block.mlp(block.norm_2(x))
    return torch.stack(found).mean(dim=(0, 2))


@pytest.mark.parametrize("style", STYLES)
def test_class_attention_is_the_mean_of_all_blocks_and_heads(style: str) -> None:
    model, images = tower(**STYLES[style]), pictures()
    features, attention = class_attention(model, images)
    torch.testing.assert_close(attention, written_out(model, images), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(features, model(images).detach(), rtol=0, atol=0)
    assert not attention.requires_grad and not features.requires_grad
    assert not any(module._forward_hooks for module in model.modules())  # nothing stays behind


def test_no_class_token_no_attention() -> None:
    with pytest.raises(ValueError, match=r"model\.image\.class_token=true"):
        class_attention(tower(class_token=False, pooling="mean"), pictures())


def clip() -> ViewsCLIP:
    torch.manual_seed(0)
    return ViewsCLIP(
        image=tower(),
        text=TextTransformer(vocab_size=30, context_length=6, width=16, layers=1, heads=2),
        embed_dim=8,
        hidden_ratio=1.5,
        projection_width=5,
    ).double()


def test_views_are_images_of_their_own() -> None:
    model, images = clip(), pictures(4, 2)
    tokens = torch.randint(1, 28, (4, 6))
    kept = torch.stack([torch.randperm(9)[:4] for _ in range(8)]).view(4, 2, 4)
    target = torch.randn(4, 5, dtype=torch.float64)
    found = model(images, tokens, kept, None, target)
    assert found["target"] is target and found["other_views"].shape == (4, 1, 8)
    assert torch.equal(found["text_embed"], model.encode_text(tokens))
    near = {"rtol": 1e-9, "atol": 1e-12}
    for view, embed in enumerate((found["image_embed"], found["other_views"][:, 0])):
        torch.testing.assert_close(
            embed, model.encode_image(images[:, view], kept[:, view]), **near
        )
        features = model.image(images[:, view], kept[:, view])
        torch.testing.assert_close(found["ssl_embed"][:, view], model.ssl_head(features), **near)
        predicted = model.predictor(model.projector(features))
        torch.testing.assert_close(found["predicted"][:, view], predicted, **near)


def test_heads_have_the_widths_of_aclip_and_no_batch_norm() -> None:
    with torch.device("meta"):
        model = ViewsCLIP(
            image=VisionTransformer(image_size=32, patch_size=16, width=768, layers=1, heads=12),
            text=TextTransformer(vocab_size=30, context_length=6, width=16, layers=1, heads=2),
            embed_dim=8,
            hidden_ratio=5.33333,
        )
    widths = {
        name: [m.out_features for m in getattr(model, name) if isinstance(m, nn.Linear)]
        for name in model.training_only
    }
    assert widths == {
        "ssl_head": [4096, 4096, 256],
        "projector": [4096, 256],
        "predictor": [4096, 256],
    }
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
    with pytest.raises(ValueError, match=r"hidden_ratio 0\.0"):
        ViewsCLIP(image=tower(), text=model.text, embed_dim=8, hidden_ratio=0.0)


def test_without_weights() -> None:
    with without_weights():
        model = clip()
    assert all(p.is_meta for p in model.parameters())


def test_the_teacher_speaks_with_the_weights_it_is_given() -> None:
    model, other, images = clip(), clip(), pictures()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    teacher = Teacher(model)
    weights = teacher.named(dict(other.named_parameters()))
    assert {name.partition(".")[0] for name in weights} == {"image", "projector"}
    attention, target = torch.func.functional_call(teacher, weights, (images,))
    features, expected = class_attention(other.image, images)
    assert torch.equal(attention, expected)
    assert torch.equal(target, other.projector(features).detach()) and not target.requires_grad
    assert not torch.equal(attention, teacher(images)[0])
