"""Every model of conf/model/ has the published number of parameters; the large ones are built
without memory.
"""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from pipeline.config import CONF, build
from pipeline.models.without_weights import without_weights

# open_clip 3.3.0's own models have these counts; where that has none, see the comment
PARAMETERS = {
    "micro_32": 1_095_745,  # ours
    "vit_ti_16": 24_626_049,  # ours
    "vit_s_32": 63_085_825,
    "vit_s_16": 62_257_537,
    "vit_b_32": 151_277_313,
    "vit_b_16": 149_620_737,
    "vit_l_16": 427_739_393,
    "vit_l_14": 427_616_513,
    "vit_l_14_336": 427_944_193,
    "vit_h_14": 986_109_441,
    "vit_g_14": 1_366_678_273,
    "vit_bigg_14": 2_539_567_105,
    "siglip_b_16": 203_155_970,
    "siglip_l_16": 652_150_786,
    "siglip_so400m_14": 877_360_306,
    "eva_g_14": 1_136_435_841,
    "eva02_b_16": 149_691_137,
    "eva02_l_14": 427_755_457,
    "eva02_l_14_336": 428_083_137,
    "eva_e_14": 4_704_589_569,
    "eva_e_14_plus": 5_044_889_089,
    "eva_18b": 18_325_483_777,  # arXiv:2402.04252 says 18.1 B, of them 17.5 B for images
    "clipa_l_16": 427_704_833,  # ViT-L/16 of 32 words in place of 77
    "clipa_h_14": 968_235_009,  # with its fixed position table, which open_clip counts
    "flip_l_16": 413_200_129,  # with its table; arXiv:2212.00794 has no count
    "aclip_b_16": 149_619_969,  # SLIP's ViT-B/16 (arXiv:2112.12750)
    "metaclip2_h_14": 1_858_783_745,
    "chinese_clip_b_16": 188_262_913,  # arXiv:2211.01335, table 2: 188 M
}


def composed(name: str) -> object:
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        return compose(config_name=f"model/{name}").model


def test_every_size_is_listed() -> None:
    assert {path.stem for path in Path(CONF, "model").glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    with torch.device("meta"):
        model = build(composed(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(model.image.position, nn.Parameter):
        count += model.image.position.numel()
    assert count == PARAMETERS[name]


@pytest.mark.parametrize("name", ["siglip_b_16", "eva02_b_16", "clipa_h_14", "chinese_clip_b_16"])
def test_built_without_weights_it_lacks_nothing_else(name: str) -> None:
    """Names, shapes, what is frozen, fixed tables; nothing is drawn."""
    config = composed(name)
    config.embed_dim, heads = 128, 4
    for tower in (config.image, config.text):
        if "layers" in tower:
            tower.width, tower.layers, tower.heads = 128, 2, heads
    if "config" in config.text:
        config.text.config.hidden_size = config.text.config.intermediate_size = 96
        config.text.config.num_hidden_layers = 2
    expected = build(config)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with without_weights():
        model = build(config)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = [
        {name: (p.shape, p.requires_grad) for name, p in one.named_parameters()}
        for one in (model, expected)
    ]
    assert shapes[0] == shapes[1]
    tables = dict(expected.named_buffers())
    assert all(torch.equal(table, tables.pop(name)) for name, table in model.named_buffers())
    assert not tables
    assert not next(build(config).parameters()).is_meta


def test_shared_parameters_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.zeros(3))
            self.one, self.two = nn.Linear(2, 3), nn.Linear(2, 3)
            self.one.bias = self.two.bias = weight
            self.two.weight = self.one.weight

    with without_weights():
        model = Tied()
    assert model.one.bias is model.two.bias and model.one.weight is model.two.weight
