"""Text models of transformers, small and random, saved where a user's would lie."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from pipeline.models.clip import CLIP
from pipeline.models.hf_text import HfText
from pipeline.models.vit import VisionTransformer

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
T5 = {"d_model": 24, "d_kv": 12, "num_layers": 2, "num_heads": 2, "d_ff": 48, "vocab_size": 60}
CONFIGS = {
    "bert": SIZES,
    "xlm-roberta": SIZES | {"pad_token_id": 1},
    "distilbert": {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 60},
    "t5": T5,
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    """(directory, the model that was saved there)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **CONFIGS[request.param])
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    return str(tmp_path), model


def captions(pad: int) -> torch.Tensor:
    tokens = torch.full((3, 9), pad)
    for row, length in enumerate((4, 9, 6)):
        tokens[row, :length] = torch.randint(3, 60, (length,))
    return tokens


def test_features_are_those_of_the_model_itself(saved):
    path, model = saved
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    pad = model.config.pad_token_id
    tokens = captions(pad)
    with torch.no_grad():
        hidden = [encoder(input_ids=row[None][row[None] != pad][None]) for row in tokens]
        hidden = [out.last_hidden_state[0] for out in hidden]
        for pooling, pick in (
            ("mean", lambda x: x.mean(0)),
            ("first", lambda x: x[0]),
            ("eot", lambda x: x[-1]),
        ):
            tower = HfText(path=path, context_length=12, pooling=pooling).eval()
            assert (tower.width, tower.vocab_size, tower.context_length) == (24, 60, 12)
            expected = torch.stack([pick(x) for x in hidden])
            torch.testing.assert_close(tower(tokens), expected, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient():
    """DistributedDataParallel waits for those that do not."""
    for kind, config in CONFIGS.items():
        text = HfText(config={"model_type": kind, **config}, context_length=12)
        image = VisionTransformer(image_size=8, patch_size=4, width=16, layers=1, heads=2)
        model = CLIP(image=image, text=text, embed_dim=10)
        model.encode_text(captions(text.pad_id))[:, 0].sum().backward()
        unused = [name for name, p in model.text.named_parameters() if p.grad is None]
        assert unused == [], kind


def test_recomputed_activations_change_nothing():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = {"model_type": "bert", **SIZES}
        tower = HfText(config=config, context_length=12, activation_checkpointing=recompute)
        torch.manual_seed(1)
        tower(captions(0)).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_what_cannot_be_built_says_why(tmp_path):
    bert = {"model_type": "bert", **SIZES}
    with pytest.raises(ValueError, match="give one of them"):
        HfText(context_length=12)
    with pytest.raises(ValueError, match="give one of them"):
        HfText(context_length=12, path="x", config=bert)
    with pytest.raises(ValueError, match="needs `model_type`"):
        HfText(context_length=12, config=SIZES)
    with pytest.raises(ValueError, match=r"'cls': one of \['eot', 'first', 'mean'\]"):
        HfText(context_length=12, config=bert, pooling="cls")
    with pytest.raises(ValueError, match="context_length 41 is more than the 40 positions"):
        HfText(context_length=41, config=bert)
    with pytest.raises(ValueError, match="more than the 38 positions"):
        HfText(context_length=39, config={**CONFIGS["xlm-roberta"], "model_type": "xlm-roberta"})
    with pytest.raises(ValueError, match="give pad_id"):
        HfText(context_length=12, config={"model_type": "gpt2", "n_embd": 24, "n_head": 2})
    with pytest.raises(ValueError, match="has no model"):
        HfText(context_length=12, path=str(tmp_path))
    tower = HfText(context_length=12, config=bert)
    with pytest.raises(ValueError, match="13 positions"):
        tower(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="text_tokens policy that shortens"):
        tower(captions(0), torch.zeros(3, 2, dtype=torch.int64))
