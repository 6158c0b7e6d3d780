"""Run by the peer interpreter: small random models of open_clip and timm, as files, and what they
compute.

    python open_clip_random.py DIRECTORY

Leaves NAME.pt or NAME.safetensors for each model, NAME_tower.safetensors for timm's tower of it,
and oracle.pt: the inputs, each model's embeddings, and position tables as open_clip resizes them.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip.model
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig

EVA = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "global_pool": "token",
    "num_classes": 20,
}
TOWERS = {
    "eva02": lambda: Eva(
        **EVA,
        qkv_fused=False,
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
    ),
    "eva_g": lambda: Eva(**EVA, mlp_ratio=4.3637),
    "eva_e": lambda: Eva(**EVA, mlp_ratio=5.0, use_post_norm=True),
    "siglip": lambda: VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
        class_token=False,
        global_pool="map",
        num_classes=0,
    ),
}
BERT = {
    "vocab_size": 300,
    "max_position_embeddings": 20,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {"context_length": 14, "vocab_size": 300, "width": 24, "heads": 2, "layers": 2}


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter off its initial value, so that a mix-up shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def normal(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def resized(rows: int, grid: int) -> dict[str, torch.Tensor]:
    """open_clip's own resizing, of a table of `rows` patches and a text table."""
    tables = {
        "visual.positional_embedding": torch.randn(1 + rows, 6),
        "positional_embedding": torch.randn(8, 6),
    }
    before = {f"{name} before": table for name, table in tables.items()}
    model = SimpleNamespace(
        visual=SimpleNamespace(grid_size=(grid, grid)), positional_embedding=torch.empty(14, 6)
    )
    open_clip.model.resize_pos_embed(tables, model)
    open_clip.model.resize_text_pos_embed(tables, model)
    return before | tables


@torch.no_grad()
def main(directory: str) -> None:
    torch.manual_seed(0)
    out = Path(directory)
    pixels = torch.randn(4, 3, 32, 32)
    tokens = torch.randint(1, 299, (4, 14))
    tokens[:, 9], tokens[:, 10:] = 299, 0
    oracle = {"pixels": pixels, "tokens": tokens}
    for name, make in TOWERS.items():
        text = {"causal": {}, "siglip": {"no_causal_mask": True, "pool_type": "last"}}
        options = text.get(name, {}) | {"proj_bias": name == "siglip"}
        trunk = shake(make())
        width = 48 if name == "siglip" else 20
        tower = shake(TextTransformer(**TEXT, output_dim=width, **options))
        weights = {f"visual.trunk.{n}": t for n, t in trunk.state_dict().items()}
        weights |= {f"text.{n}": t for n, t in tower.state_dict().items()}
        weights["logit_scale"] = torch.tensor(2.0)
        if name == "siglip":
            weights["logit_bias"] = torch.tensor(-9.0)
        save_file({n: t.contiguous() for n, t in weights.items()}, out / f"{name}.safetensors")
        weights = {n: t.contiguous() for n, t in trunk.state_dict().items()}
        save_file(weights, out / f"{name}_tower.safetensors")
        oracle[name] = (normal(trunk(pixels)), normal(tower(tokens)))
    clip = open_clip.model.CLIP(
        20,
        {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 12},
        TEXT,
        quick_gelu=True,
    )
    shake(clip)
    oracle["open_clip"] = (clip.encode_image(pixels, True), clip.encode_text(tokens, True))
    weights = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights}, out / "open_clip.pt")
    encoder = shake(
        HFTextEncoder(
            "", 20, config=BertConfig(**BERT), pooler_type="mean_pooler", proj_type="linear"
        )
    )
    encoder.transformer.pooler = None  # the mean needs none, and files have none
    visual = {f"visual.{name}": tensor for name, tensor in clip.visual.state_dict().items()}
    text = {f"text.{name}": tensor for name, tensor in encoder.state_dict().items()}
    weights = visual | text | {"logit_scale": torch.tensor(2.0)}
    torch.save({"state_dict": weights}, out / "hf_text.pt")
    oracle["hf_text"] = (clip.encode_image(pixels, True), normal(encoder(tokens)))
    for rows, grid in ((49, 4), (16, 7)):
        oracle[f"resized to {grid}"] = resized(rows, grid)
    torch.save(oracle, out / "oracle.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
