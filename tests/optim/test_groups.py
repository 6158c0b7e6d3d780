import torch

from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.optim.groups import parameter_groups


def tiny() -> CLIP:
    return CLIP(
        image=VisionTransformer(image_size=8, patch_size=4, width=16, layers=1, heads=2),
        text=TextTransformer(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
        embed_dim=12,
    )


def test_every_parameter_is_in_one_group_by_its_dimensions() -> None:
    model = tiny()
    decayed, exempt = parameter_groups(model, weight_decay=0.2)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.2, 0.0)
    assert sorted(decayed["names"] + exempt["names"]) == sorted(dict(model.named_parameters()))
    assert all(name.endswith(("weight", "position")) for name in decayed["names"])
    for name in ("log_logit_scale", "image.class_token", "image.ln_pre.weight"):
        assert name in exempt["names"]
    named = dict(model.named_parameters())
    for group in (decayed, exempt):
        assert all(named[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.image.requires_grad_(False)
    names = [name for group in parameter_groups(model, weight_decay=0.2) for name in group["names"]]
    assert names
    assert not any(name.startswith("image.") for name in names)


def test_only_decayed_parameters_shrink() -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in groups[0]["names"] else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
