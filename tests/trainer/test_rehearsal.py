"""A mistake in the last phase is found before the first is trained and the name is taken."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch import nn

from pipeline.check import composed
from pipeline.config import CONF, check
from pipeline.phases import phases
from pipeline.trainer.rehearsal import rehearse, rehearse_shapes
from pipeline.trainer.run import train


class Numbers(nn.Module):
    """A tower that cannot be made on shapes alone."""

    width, context_length = 64, 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.init.ones_(nn.Parameter(nn.Linear(2, 64).weight.detach())))
        self.first = self.weight[0, 0].item()


@pytest.fixture
def config(data, tmp_path):
    """config(*words, b) of two phases a and b of three steps; b: what b changes."""

    def make(*words, **b):
        given = [
            *("recipe=emoji", "debug=tiny", "name=x", f"runs_dir={tmp_path}"),
            *(f"data.shards={data}/shards", f"tokenizer.path={data}/tokenizer"),
            *("model.text.vocab_size=600", "schedule.warmup_samples=32"),
            *("every_phase=null", "samples_seen=???", "+phases.a.samples_seen=96"),
            *words,
        ]
        cfg = composed("train", given)
        OmegaConf.update(cfg, "phases.b", {"samples_seen": 96, **b}, force_add=True)
        check(cfg)
        return cfg

    return make


SIGMOID = {"_target_": "pipeline.losses.sigmoid.SigmoidLoss"}
MUON = OmegaConf.to_container(OmegaConf.load(Path(CONF, "optimizer/muon.yaml")))
LAMB = OmegaConf.to_container(OmegaConf.load(Path(CONF, "optimizer/lamb.yaml")))
WRONG = [
    ({"frozen": ["visual.*"]}, "no parameter is called 'visual.*'"),
    ({"frozen": ["*"]}, "leaves no parameter that learns"),
    ({"loss_weights": {"sofmax": 2}}, "unknown terms ['sofmax']"),
    ({"loss": {"softmax": SIGMOID}}, "needs a logit bias"),
    ({"loss": {"softmax": None}}, "at least one term"),
    ({"data": {"shards": "/nowhere"}}, "/nowhere"),
    ({"global_batch_size": 96}, "holds 80 pairs"),
    ({"transform": {"image_size": 16}}, "transform.image_size=16 is not the image tower's 32"),
    ({"model": {"image": {"image_size": 30}}}, "model.image: image_size 30 is not a multiple"),
    ({"image_tokens": {"keep": 1.5}}, "image_tokens: keep 1.5 is outside"),
    (
        {"image_tokens": {"_target_": "pipeline.tokens.attentive.AttentiveTokens", "keep": 0.5}},
        "image_tokens=attentive without",
    ),
    ({"tokenizer": {"context_length": 32}}, "tokenizer.context_length=32 is above the 16"),
    (
        {
            "text_tokens": {
                "_target_": "pipeline.tokens.text_random.RandomText",
                "context_length": 2,
            }
        },
        "text_tokens.context_length 2 leaves no room",
    ),
    ({"optimizer": {"towers": {"visual": {"lr": 1.0}}}}, "towers.visual: no parameter is in it"),
    ({"optimizer": MUON}, "optimizer_state=reset"),
    ({"schedule": {"warmup_samples": -1}}, "schedule: "),
    ({"ema": {"_target_": "pipeline.trainer.callbacks.ema.Ema", "decay": 2.0}}, "ema: decay 2.0"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_later_phase(change, words, config, tmp_path):
    with pytest.raises(ValueError, match="^phase b: ") as caught:
        train(config(**change))
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


RIGHT = [
    {},
    {"loss": {"softmax": None, "sigmoid": SIGMOID}, "frozen": ["image.*"]},
    {"optimizer": MUON, "optimizer_state": "reset"},
    {"optimizer": LAMB},
    {"model": {"image": {"image_size": 16}}, "tokenizer": {"context_length": 12}},
]


@pytest.mark.parametrize("change", RIGHT, ids=lambda value: str(value)[:40])
def test_what_is_right(change, config):
    rehearse(config("+model.init_logit_bias=-10", "+loss_weights.softmax=2", **change))


@pytest.mark.parametrize(
    ("word", "message"),
    [("ema=none", "set ema=cosine"), ("trainer=fsdp", "use trainer=ddp, or deepspeed_1")],
)
def test_attentive_masking_wants_a_whole_average(word, message):
    words = ["recipe=aclip_b16_yfcc15m", "debug=tiny", "name=x", "data.shards=y"]
    rehearse_shapes(phases(composed("train", words)))
    with pytest.raises(ValueError, match=message):
        rehearse_shapes(phases(composed("train", [*words, word])))


def test_phases_that_are_done_are_not_looked_at_again(config, tmp_path):
    cfg = config("+phases.a.data.shards=/gone")
    with pytest.raises(ValueError, match="phase a: .*/gone"):
        rehearse(cfg)
    folder = tmp_path / "x" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000003.ckpt").touch()
    rehearse(cfg)


def test_a_tower_that_needs_its_numbers_is_made(config):
    cfg = config("allow_foreign_targets=true", "tokenizer.context_length=16")
    cfg.model.text = {"_target_": f"{__name__}.Numbers"}
    rehearse_shapes(phases(cfg))


TRAINERS = [
    ("muon", "deepspeed_2", "MuonWithAdamW looks at whole parameters"),
    ("adafactor", "deepspeed_1", "use trainer=ddp, or"),
    ("adafactor", "fsdp", "use trainer=ddp, or"),
    ("adamw ema=constant", "deepspeed_3", "ema: ZeRO-3"),
    ("adamw ema=constant", "deepspeed_2", None),
    ("adamw ema=constant", "fsdp", None),
    ("muon", "fsdp", None),
    ("lamb", "deepspeed_3", None),
    ("adafactor", "ddp", None),
]


@pytest.mark.parametrize(("optimizer", "trainer", "words"), TRAINERS)
def test_optimizers_and_averages_that_a_strategy_gets_wrong(optimizer, trainer, words, config):
    plan = phases(config(*f"optimizer={optimizer} trainer={trainer}".split()))
    if words is None:
        rehearse_shapes(plan)
        return
    with pytest.raises(ValueError, match=words):
        rehearse_shapes(plan)


TEXT = ["text_tokens=random", "text_tokens.context_length=8"]


def test_captions_are_cut_where_their_end_is_known(config):
    rehearse(config(*TEXT))
    with pytest.raises(ValueError, match="HfTokenizer does not say that its end of text"):
        rehearse_shapes(phases(config(*TEXT, "tokenizer=hf", "tokenizer.path=x")))
