import math

import pytest
import torch

from pipeline.metric import Lorentz
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer


def tiny(**changes: float) -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        image=VisionTransformer(image_size=8, patch_size=4, width=16, layers=1, heads=2),
        text=TextTransformer(vocab_size=20, context_length=6, width=24, layers=1, heads=2),
        embed_dim=12,
        **changes,
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 18, (5, 6), generator=generator)
    tokens[:, 0], tokens[:, 5] = 18, 19
    return torch.randn(5, 3, 8, 8, generator=generator), tokens


def test_embeddings_are_projected_and_of_unit_norm() -> None:
    model = tiny()
    images, tokens = batch()
    image_embed, text_embed = model(images, tokens)
    assert image_embed.shape == text_embed.shape == (5, 12)
    for embed, features, projection in (
        (image_embed, model.image(images), model.image_projection),
        (text_embed, model.text(tokens), model.text_projection),
    ):
        projected = features @ projection.weight.T
        torch.testing.assert_close(embed, projected / projected.norm(dim=1, keepdim=True))


def test_the_cosine_has_no_parameters_of_its_own() -> None:
    assert not any("curvature" in name or "factor" in name for name in tiny().state_dict())
    curved = {"log_curvature", "log_image_factor", "log_text_factor"}
    assert set(tiny(metric=Lorentz()).state_dict()) - set(tiny().state_dict()) == curved


def test_kept_tokens_reach_their_towers() -> None:
    model = tiny()
    images, tokens = batch()
    image_kept = torch.tensor([[3, 0]]).expand(5, 2)
    text_kept = torch.tensor([[0, 2, 5]]).expand(5, 3)
    image_embed, text_embed = model(images, tokens, image_kept, text_kept)
    assert torch.equal(image_embed, model.encode_image(images, image_kept))
    assert torch.equal(text_embed, model.encode_text(tokens, text_kept))
    assert not torch.allclose(image_embed, model.encode_image(images))
    assert not torch.allclose(text_embed, model.encode_text(tokens))


def test_embeddings_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        image_embed, text_embed = tiny()(*batch())
    for embed in (image_embed, text_embed):
        assert embed.dtype == torch.float32
        torch.testing.assert_close(embed.norm(dim=1), torch.ones(5))


def test_projections_are_initialised_as_clip_does() -> None:
    torch.manual_seed(0)
    model = tiny()
    wide = CLIP(image=model.image, text=model.text, embed_dim=4096)
    assert wide.image_projection.weight.std().item() == pytest.approx(16**-0.5, rel=0.02)
    assert wide.text_projection.weight.std().item() == pytest.approx(24**-0.5, rel=0.02)
    assert wide.image_projection.bias is None


def test_logit_scale_starts_at_clips_temperature() -> None:
    model = tiny()
    assert model.log_logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert model.loss_parameters() == {"log_logit_scale": model.log_logit_scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximum", [20.0, 50.0, 100.0])
def test_logit_scale_is_bounded_and_can_come_back(dtype: torch.dtype, maximum: float) -> None:
    model = tiny(max_logit_scale=maximum).to(dtype)
    for start, bound in ((7.0, math.log(maximum)), (-1.0, 0.0)):
        model.log_logit_scale.data.fill_(start)
        assert model.logit_scale.item() <= maximum * (1 + 1e-6)
        model.clamp_logit_scale()
        assert model.log_logit_scale.item() == pytest.approx(bound, abs=1e-6)
        # A gradient of zero at the bound would keep the scale there for the rest of the run.
        (gradient,) = torch.autograd.grad(model.logit_scale, model.log_logit_scale)
        assert gradient.item() == pytest.approx(math.exp(bound), rel=1e-6)


def test_scale_outside_its_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"init_logit_scale 200\.0"):
        tiny(init_logit_scale=200.0)


def test_projections_by_name() -> None:
    model = tiny(text_projection="biased")
    torch.nn.init.normal_(model.text_projection.bias)
    images, tokens = batch()
    expected = torch.nn.functional.normalize(model.text_projection(model.text(tokens)), dim=1)
    torch.testing.assert_close(model.encode_text(tokens), expected)
    model = CLIP(image=model.image, text=model.text, embed_dim=16, image_projection="none")
    expected = torch.nn.functional.normalize(model.image(images), dim=1)
    torch.testing.assert_close(model.encode_image(images), expected)
    with pytest.raises(ValueError, match=r"image_projection=none needs a tower of width 12"):
        tiny(image_projection="none")
    with pytest.raises(ValueError, match=r"text_projection 'mlp': one of"):
        tiny(text_projection="mlp")
