"""How other software names a CLIP's weights: one list of rules a layout, for writing and reading.

A layout's `sources(name)` tells from which of its tensors one of ours is made: alternatives, of
which the first that is there counts; several tensors are stacked.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]

OPEN_CLIP_RULES: Rules = [
    (r"^image\.patch_embed", "visual.conv1"),
    (r"^image\.class_token", "visual.class_embedding"),
    (r"^image\.position", "visual.positional_embedding"),
    (r"^image\.", "visual."),
    (r"^text\.token_embed", "token_embedding"),
    (r"^text\.position", "positional_embedding"),
    (r"^text\.model\.", "transformer."),  # a text model of Hugging Face's
    (r"^text\.", ""),
    (r"\.blocks\.", ".resblocks."),
    (r"\.norm_([12])\.", r".ln_\1."),
    (r"\.gain_([12])\.gain", r".ls_\1.gamma"),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),
    (r"\.attention\.norm_query\.", ".attn.ln_q."),
    (r"\.attention\.norm_key\.", ".attn.ln_k."),
    (r"\.attention\.norm_mixed\.", ".attn.ln_inner."),
    (r"\.attention\.out\.", ".attn.out_proj."),
    (r"\.mlp\.up\.", ".mlp.c_fc."),
    (r"\.mlp\.norm\.", ".mlp.ln."),
    (r"\.mlp\.down\.", ".mlp.c_proj."),
    (r"^image_projection\.weight", "visual.proj"),
    (r"^log_logit_scale", "logit_scale"),
]
# A timm tower inside open_clip (EVA, SigLIP); the text tower is open_clip's own.
TIMM_RULES: Rules = [
    (r"^image_projection\.", "visual.trunk.head."),
    (r"^image\.transformer\.", "image."),
    (r"^image\.pool\.", "image.attn_pool."),
    (r"^image\.", "visual.trunk."),
    (r"\.patch_embed\.", ".patch_embed.proj."),
    (r"\.class_token$", ".cls_token"),
    (r"\.position$", ".pos_embed"),
    (r"\.ln_post\.", ".norm."),
    (r"\.attn_pool\.probe", ".attn_pool.latent"),
    (r"\.attn_pool\.attention\.query\.", ".attn_pool.q."),
    (r"\.attn_pool\.attention\.key_value\.", ".attn_pool.kv."),
    (r"\.attn_pool\.attention\.out\.", ".attn_pool.proj."),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.gain_([12])\.gain", r".gamma_\1"),
    (r"\.attention\.norm_query\.", ".attn.q_norm."),
    (r"\.attention\.norm_key\.", ".attn.k_norm."),
    (r"\.attention\.norm_mixed\.", ".attn.norm."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.gate\.", ".mlp.fc1_g."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
]
# EVA's own files of EVA-02, where timm has other words.
EVA_RULES: Rules = [
    *TIMM_RULES,
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1\.", ".mlp.w2."),
    (r"\.mlp\.fc2\.", ".mlp.w3."),
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
]
TRANSFORMERS_RULES: Rules = [
    (r"^image\.patch_embed", "vision_model.embeddings.patch_embedding"),
    (r"^image\.class_token", "vision_model.embeddings.class_embedding"),
    (r"^image\.position", "vision_model.embeddings.position_embedding.weight"),
    (r"^image\.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
    (r"^image\.ln_post", "vision_model.post_layernorm"),
    (r"^image\.transformer\.blocks", "vision_model.encoder.layers"),
    (r"^text\.token_embed", "text_model.embeddings.token_embedding"),
    (r"^text\.position", "text_model.embeddings.position_embedding.weight"),
    (r"^text\.ln_final", "text_model.final_layer_norm"),
    (r"^text\.transformer\.blocks", "text_model.encoder.layers"),
    (r"^text\.model\.", "text_model."),  # ChineseCLIP's
    (r"\.norm_([12])\.", r".layer_norm\1."),
    (r"\.attention\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
    (r"^image_projection", "visual_projection"),
    (r"^log_logit_scale", "logit_scale"),
]
SIGLIP_RULES: Rules = [
    (r"^image\.pool\.attention\.out\.", "vision_model.head.attention.out_proj."),
    (r"^image\.pool\.norm\.", "vision_model.head.layernorm."),
    (r"^image\.pool\.", "vision_model.head."),
    (r"^text_projection", "text_model.head"),
    *TRANSFORMERS_RULES,
]


OTHERS = r"(^|\.)(attn_mask|position_ids)$|^(input_resolution|context_length|vocab_size)$"


@dataclass(frozen=True)
class Layout:
    """mark: a name that only this layout has. splits_qkv: their input projection is three layers.
    transposed: their names of matrices they multiply from the right. others: names of values that
    are no weights. image_part, text_part: how a tower's names begin. image_rules: for names of the
    image half, where they are not `rules`. joined: how a tensor of theirs begins -> how those of
    ours begin whose rows it holds one after the other, and their shares.
    """

    rules: Rules
    mark: str
    image_part: str
    text_part: str
    splits_qkv: bool = False
    image_rules: Rules | None = None
    joined: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    others: str = OTHERS

    def rename(self, name: str) -> str:
        own = self.image_rules is not None and name.startswith("image")
        for pattern, replacement in self.image_rules if own else self.rules:
            name = re.sub(pattern, replacement, name)
        return name

    def write(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names and in their layout."""
        out: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            whole = self._whole(name)
            if whole is not None:
                their, begins, ending = whole
                out[their] = torch.cat([weights[begin + ending] for begin in begins])
                continue
            pieces = {name: tensor}
            if self.splits_qkv and ".qkv." in name:
                parts = zip("qkv", tensor.chunk(3), strict=True)
                pieces = {name.replace(".qkv.", f".{part}."): piece for part, piece in parts}
            for their, piece in ((self.rename(n), piece) for n, piece in pieces.items()):
                assert their not in out, f"two weights are called {their}"
                out[their] = piece.T if their in self.transposed else piece
        return out

    def _whole(self, name: str) -> tuple[str, Mapping[str, int], str] | None:
        """Their tensor that holds one of ours beside others; how all begin, and how they end."""
        for their, begins in self.joined.items():
            for begin in begins:
                if name.startswith(begin):
                    ending = name.removeprefix(begin)
                    return their + ending, begins, ending
        return None

    def _piece(self, theirs: Mapping[str, Tensor], name: str) -> tuple[Tensor | None, set[str]]:
        their, begins, ending = self._whole(name)
        if their not in theirs:
            return None, set()
        unit = len(theirs[their]) // sum(begins.values())
        pieces = theirs[their].split([unit * share for share in begins.values()])
        found = dict(zip((begin + ending for begin in begins), pieces, strict=True))
        return found[name], {their}

    def sources(self, name: str) -> Iterator[tuple[str, ...]]:
        """Their names for one of ours, alternatives in order."""
        yield (self.rename(name),)
        if ".qkv." in name:
            for parts in ("qkv", "qv"):  # EVA's keys have no bias
                yield tuple(self.rename(name.replace(".qkv.", f".{part}.")) for part in parts)
                yield tuple(self.rename(name.replace(".qkv.", f".{part}_proj.")) for part in parts)
            yield tuple(self.rename(name.replace(".qkv.", f".{part}_")) for part in "qv")
        if name == "text_projection.weight":
            yield ("text_projection",)
            yield ("proj.weight",)  # open_clip's, behind a text model of Hugging Face's
        if ".mlp.up." in name:
            yield (self.rename(name).replace(".fc1.", ".fc1_x."),)  # timm's, beside a gate

    def read(self, theirs: Mapping[str, Tensor], name: str) -> tuple[Tensor | None, set[str]]:
        """One of our weights out of theirs, and the names it was made of; None if it is not
        there.
        """
        if self._whole(name) is not None:
            return self._piece(theirs, name)
        for names in self.sources(name):
            if all(name in theirs for name in names):
                pieces = [
                    theirs[name].T if name in self.transposed else theirs[name] for name in names
                ]
                return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)), set(names)
        return None, set()


OPEN_CLIP = Layout(
    rules=OPEN_CLIP_RULES,
    mark="visual.conv1.weight",
    image_part=r"visual\.(?!proj$)",
    text_part=r"(token_embedding|positional_embedding|transformer|ln_final)",
    transposed=("visual.proj", "text_projection"),  # open_clip multiplies from the right
)
TIMM = Layout(
    rules=OPEN_CLIP_RULES,
    image_rules=TIMM_RULES,
    mark="visual.trunk.patch_embed.proj.weight",
    image_part=r"visual\.trunk\.(?!head\.)",
    text_part=OPEN_CLIP.text_part,
    transposed=("text_projection",),
    # EVA's tables of rotary positions, and what its masked pre-training needs alone
    others=OTHERS + r"|\.rope\.freqs_(cos|sin)$|^visual\.trunk\.(mask_token$|lm_head\.)",
)
EVA = replace(TIMM, image_rules=EVA_RULES, mark="visual.trunk.blocks.0.mlp.w1.weight")
TRANSFORMERS = Layout(
    rules=TRANSFORMERS_RULES,
    mark="vision_model.embeddings.patch_embedding.weight",
    image_part=r"vision_model\.",
    text_part=r"text_model\.",
    splits_qkv=True,
)
SIGLIP = Layout(
    rules=SIGLIP_RULES,
    mark="vision_model.head.probe",
    image_part=r"vision_model\.",
    text_part=r"text_model\.(?!head\.)",
    splits_qkv=True,
    joined={
        "vision_model.head.attention.in_proj_": {
            "image.pool.attention.query.": 1,
            "image.pool.attention.key_value.": 2,
        }
    },
)
OURS = Layout(rules=[], mark="image.patch_embed.weight", image_part=r"image\.", text_part=r"text\.")
# EVA-02's files have timm's mark too, SigLIP's that of transformers.
LAYOUTS = (OURS, OPEN_CLIP, EVA, TIMM, SIGLIP, TRANSFORMERS)
