"""Every model of conf/model/ has the published number of parameters; the large ones are built
without memory.
"""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from pipeline.config import CONF, build
from pipeline.models.initialise import initialise

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
def test_built_without_memory_then_filled_is_as_if_built(name: str) -> None:
    """Each weight and each fixed table, in distribution; at a width that takes no time."""
    config = composed(name)
    config.embed_dim, heads = 128, 4
    for tower in (config.image, config.text):
        if "layers" in tower:
            tower.width, tower.layers, tower.heads = 128, 2, heads
    if "config" in config.text:
        config.text.config.hidden_size = config.text.config.intermediate_size = 96
        config.text.config.num_hidden_layers = 2
    torch.manual_seed(0)
    expected = build(config)
    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(7)  # what happens to be in memory
    torch.manual_seed(1)
    initialise(model)
    kinds = (model.named_parameters(), expected.named_parameters())
    for (name, found), (_, wanted) in zip(*kinds, strict=True):
        if wanted.std(correction=0) == 0:
            assert torch.equal(found, wanted), name
        else:
            # a sample's deviation is off by 1 / sqrt(2 n): five times that
            tolerance = 5 * (2 * found.numel()) ** -0.5 * 2**0.5
            assert found.std().item() == pytest.approx(wanted.std().item(), rel=tolerance), name
    for (name, found), (_, wanted) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(found, wanted), name


def test_a_module_that_nobody_fills_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

    with pytest.raises(ValueError, match=r"Odd has values \['weight'\] and no initialise"):
        initialise(nn.Sequential(nn.Linear(2, 2), Odd()))
