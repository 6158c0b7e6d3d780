"""Costs counted on shapes: against published figures, real runs of a small model, and by hand."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.check import composed, main
from pipeline.config import CONF, build
from pipeline.cost.optimizer import state_bytes
from pipeline.cost.phase import phase_cost
from pipeline.cost.towers import KeptBytes, blocks_of, forward_flops, kept_bytes, tower_cost
from pipeline.losses.objective import Objective
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models.pooling import ClassToken
from pipeline.phases import phases
from pipeline.trainer.cached_step import CachedContrastiveStep, encoded, formula

TINY = ["recipe=emoji", "debug=tiny", "name=x", "data.shards=y", "model.text.vocab_size=600"]
# GFLOPs of one forward, image and text: open_clip, docs/model_profile.csv, all tokens in all blocks
PUBLISHED = {
    "vit_b_32": (8.82, 5.96),
    "vit_b_16": (35.13, 5.96),
    "vit_l_14": (162.03, 13.3),
    "vit_h_14": (334.59, 47.09),
    "siglip_b_16": (35.42, 11.02),
    "eva02_b_16": (35.13, 5.96),
    "eva_g_14": (534.06, 13.3),
    "clipa_h_14": (334.59, 19.43),
}


def shapes(name, device="meta"):
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = compose(config_name=f"model/{name}").model
    with torch.device(device):
        return build(config)


def costs_of(*overrides, world_size=1):
    return [phase_cost(phase, world_size) for phase in phases(composed("train", overrides))]


def spared(transformer, tokens):
    """What the last block does not compute where one token is read of it: every other token's
    query, scores, output and MLP.
    """
    block = transformer.blocks[-1]
    layers = [block.attention.out, *block.mlp.readers, block.mlp.down]
    weights = sum(layer.weight.numel() for layer in layers)
    return (2 * weights + 4 * tokens * transformer.width) * (tokens - 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_forward_has_the_published_operations(name):
    model = shapes(name)
    size, words = model.image.image_size, model.text.context_length
    images = torch.empty(1, 3, size, size, device="meta")
    tokens = torch.zeros(1, words, dtype=torch.int64, device="meta")
    found = [
        forward_flops(lambda: model.encode_image(images)),
        forward_flops(lambda: model.encode_text(tokens)),
    ]
    expected = [1e9 * gflops for gflops in PUBLISHED[name]]
    if isinstance(model.image.pool, ClassToken):
        expected[0] -= spared(model.image.transformer, 1 + model.image.num_tokens)
    if model.text.pooling != "mean":
        expected[1] -= spared(model.text.transformer, words)
    assert found == pytest.approx(expected, rel=0.002)


def micro(device="cpu"):
    torch.manual_seed(0)
    model = shapes("micro_32", device)
    return model, torch.rand(3, 3, 32, 32, device=device)


def test_what_is_kept_is_what_a_real_forward_keeps():
    model, images = micro()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model.encode_image(images)
    real = sum(storage.nbytes() for storage in alive.values())
    assert out.requires_grad
    shape, images = micro("meta")
    counted = kept_bytes(shape, lambda: shape.encode_image(images), None, recompute=False)
    assert counted == pytest.approx(real, rel=0.01)


def test_recomputed_blocks_keep_their_inputs_and_one_block():
    model, images = micro("meta")
    blocks = blocks_of(model.image)
    whole = kept_bytes(model, lambda: model.encode_image(images), None, recompute=False)
    recomputed = kept_bytes(model, lambda: model.encode_image(images), None, recompute=True)
    one = KeptBytes(model)
    x = torch.empty(3, 65, 96, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(one.pack, lambda x: x):
        # on the meta device attention is spelled out, so MLP alone: the first norm's input is x
        blocks[0].mlp(blocks[0].norm_2(x))
    assert len(blocks) == 4 and recomputed < 0.5 * whole
    # three blocks fewer, each for its input; every block keeps more than its MLP
    saved = (whole - recomputed + 4 * x.nbytes) / 3
    assert one.total < saved < 3 * one.total


def test_half_precision_keeps_half_and_copies_of_weights():
    model, _ = micro("meta")

    def forward(batch):
        return model.encode_image(torch.empty(batch, 3, 32, 32, device="meta"))

    full, mixed = (
        tower_cost(model.image, model.image_projection, forward, half=half, recompute=False)
        for half in (None, torch.bfloat16)
    )
    matrices = sum(p.numel() for p in model.image.parameters() if p.ndim > 1)
    assert full.fixed_bytes < 1000 and full.flops == mixed.flops
    assert mixed.fixed_bytes == pytest.approx(2 * matrices, rel=0.05)
    assert 0.5 < mixed.sample_bytes / full.sample_bytes < 0.65  # the residual stream stays whole
    parameters = [*model.image.parameters(), *model.image_projection.parameters()]
    assert full.parameters == full.trained == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon", "adafactor"])
def test_optimizer_state_is_what_a_real_step_leaves(optimizer):
    cfg = composed("train", [*TINY, f"optimizer={optimizer}"])
    model = build(cfg.model)
    model.image.requires_grad_(False)
    made = build(cfg.optimizer).make(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    made.step()
    real = sum(
        value.nbytes
        for state in made.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    with torch.device("meta"):
        shape = build(cfg.model)
    shape.image.requires_grad_(False)
    assert state_bytes(build(cfg.optimizer), shape) == real


def test_the_copy_that_steps_has_the_models_dtype():
    model = shapes("micro_32").to(torch.bfloat16)
    elements = sum(p.numel() for p in model.parameters())
    found = state_bytes(build(composed("train", TINY).optimizer), model)
    assert found == pytest.approx(2 * 2 * elements, rel=0.01)


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_a_step_has_the_operations_that_are_counted(micro_batch):
    """The cached step itself, on a CPU; attention apart, which the counter does not see there."""
    (cost,) = costs_of(*TINY, "global_batch_size=8", f"micro_batch_size={micro_batch}")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counter = FlopCounterMode(display=False)
        model, _ = micro()
        objective = Objective(terms={"softmax": SoftmaxLoss()})
        step = CachedContrastiveStep(
            encode=lambda *chunk: encoded(model, objective, chunk, frozenset()),
            loss_scalars=model.loss_scalars,
            objective=formula(objective),
            micro_batch_size=micro_batch,
        )
        kept = torch.stack([torch.randperm(64)[: cost.kept] for _ in range(8)])
        with counter:
            step(torch.rand(8, 3, 32, 32), torch.randint(0, 600, (8, cost.words)), kept)
    # the first layer needs no gradient of its input: a little less than three forwards
    assert counter.get_total_flops() / 8 == pytest.approx(cost.flops_per_pair, rel=0.03)


def test_frozen_recomputed_and_run_twice_by_hand():
    base = [*TINY, "global_batch_size=8", "image_tokens.keep=1"]
    (plain,) = costs_of(*base)
    image, text, loss = plain.image.flops, plain.text.flops, plain.loss_flops_per_pair
    assert loss == 12 * 8 * 96 and plain.flops_per_pair == 3 * (image + text) + loss
    (cached,) = costs_of(*base, "micro_batch_size=3")
    assert cached.run_twice == 6 / 8  # the last two pairs keep their graph
    assert cached.flops_per_pair == pytest.approx(3.75 * (image + text) + loss)
    (frozen,) = costs_of(*base, "frozen=[image.*,image_projection.*]")
    assert frozen.flops_per_pair == image + 3 * text + loss and frozen.image.sample_bytes == 0
    (again,) = costs_of(*base, "model.text.activation_checkpointing=true")
    assert again.flops_per_pair == 3 * image + 4 * text + loss
    assert again.text.sample_bytes < plain.text.sample_bytes
    (dropped,) = costs_of(*base[:-1], "image_tokens.keep=0.25")
    assert dropped.kept == 16 and dropped.image.flops < 0.3 * image
    (shorter,) = costs_of(*base, "text_tokens=truncate", "text_tokens.context_length=8")
    assert (shorter.words, shorter.caption) == (8, 16) and shorter.text.flops < 0.55 * text
    assert plain.gpu_hours(1e12, 0.5) == pytest.approx(plain.flops / 0.5e12 / 3600)


def test_memory_is_cut_into_pieces_by_hand():
    (cost,) = costs_of(*TINY, "global_batch_size=32", world_size=4)
    parameters = cost.parameters
    model = build(composed("train", TINY).model)
    assert parameters == sum(p.numel() for p in model.parameters()) - 1  # the logit scale
    ddp, one, two, three, fsdp = (
        cost.memory(name) for name in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
    )
    assert ddp["weights"] == one["weights"] == two["weights"] == 4 * parameters
    assert ddp["gradients"] == 8 * parameters and one["gradients"] == 4 * parameters
    assert two["gradients"] == three["gradients"] == parameters
    assert ddp["optimizer"] == cost.state_bytes > 8 * parameters
    assert one["optimizer"] == three["optimizer"] == -(-cost.state_bytes // 4)
    block = sum(p.numel() for p in model.image.transformer.blocks[0].parameters())
    assert three["weights"] == parameters + 2 * 2 * 4 * block
    assert one["masters"] == two["masters"] == three["masters"] == parameters  # a float32 quarter
    assert ddp["masters"] == fsdp["masters"] == 0 and fsdp == three | {"masters": 0}
    (mixed,) = costs_of(
        *TINY, "global_batch_size=32", "trainer.precision=bf16-mixed", "ema=constant", world_size=4
    )
    ddp_mixed, one_mixed = mixed.memory("DDP"), mixed.memory("ZeRO-1")
    assert ddp_mixed["weights"] == 8 * parameters and ddp_mixed["half copies"] > 0
    assert one_mixed["weights"] == (2 + 4) * parameters and one_mixed["half copies"] == 0
    assert ddp["images"] == 8 * 3 * 32 * 32 * 5
    assert ddp["activations"] == 8 * cost.pair_bytes
    assert ddp["features, loss"] == 2 * 4 * 96 * (32 + 16) + 16 * 8 * 32
    (tiled,) = costs_of(*TINY, "global_batch_size=32", "loss=tiled_softmax")
    assert not tiled.logits and cost.logits
    enough = sum(ddp.values())
    assert cost.largest_micro_batch("DDP", enough) == 8
    assert cost.largest_micro_batch("DDP", enough - 1) == 7
    assert cost.largest_micro_batch("DDP", enough - ddp["activations"] - 1) == 0


def printed(capsys, *words):
    with pytest.raises(SystemExit) as done:
        main(list(words))
    return done.value.code, " ".join(capsys.readouterr().out.split())


def test_clip_check_prints_a_runs_price(capsys):
    code, text = printed(capsys, "recipe=clip_b32_laion400m", "world_size=128")
    assert code == 0
    for words in (
        "still to give: name=..., data.shards=...",
        "steps │ 390,625",
        "text positions seen │ 77 of 77",
        "image forward │ 8.29",
        "A100 hours │ 1,192",
        "GB on each of 128 GPUs",
    ):
        assert words in text
    halved = printed(capsys, "recipe=clip_b32_laion400m", "world_size=128", "mfu=0.2")[1]
    assert "A100 hours │ 2,384" in halved and "at 20% of" in halved


@pytest.mark.slow
def test_clip_check_counts_each_phase(capsys):
    """CLIPA's own count is 8,640 A100-80 hours: 35 % of the peak."""
    code, text = printed(capsys, "recipe=clipa_v2_h14", "world_size=64", "name=x")
    assert code == 0 and "data.shards=..." in text and "name=..." not in text
    assert "│ pretrain │ tune_224 │ tune_336 │ all" in text.replace("┃", "│")
    assert "36 of 36 │ 179 of 256 │ 345 of 576" in text
    assert "8 of 77 │ 32 of 32 │ 32 of 32" in text
    assert "7,628" in text


@pytest.mark.parametrize("word", ["mfu=0", "mfu=fast", "world_size=0"])
def test_a_wrong_knob_is_named(capsys, word):
    code, text = printed(capsys, "recipe=emoji", word)
    assert code == 2 and f"clip-check: {word}: a number above 0" in text


def test_a_config_whose_sizes_are_missing_is_checked_without_costs(capsys):
    code, text = printed(capsys, "recipe=emoji", "name=x", "samples_seen=???")
    assert code == 0 and "still to give: samples_seen=..." in text and "no costs: " in text


def test_a_tower_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        blocks_of(copy.deepcopy(nn.Linear(2, 2)))


def test_views_and_the_averaged_towers_look_are_counted():
    words = [w for w in TINY if not w.startswith("recipe")]
    (views,) = costs_of("recipe=aclip_b16_yfcc15m", *words)
    plain = ["recipe=emoji", *words, "image_tokens.keep=1"]
    (whole,) = costs_of(*plain)
    # 9 of 16 cells of 4 patches
    assert views.kept == 36 and views.views == 2
    hidden, width, out = 512, 96, 256
    ssl = width * hidden + hidden * hidden + hidden * out
    projector = width * hidden + hidden * out
    heads = 2 * (ssl + projector + 2 * out * hidden)
    model = build(composed("train", plain).model)
    tower = tower_cost(
        model.image.to("meta"),
        model.image_projection.to("meta"),
        lambda n: model.encode_image(
            torch.empty(n, 3, 32, 32, device="meta"),
            torch.zeros(n, 36, dtype=torch.int64, device="meta"),
        ),
        half=None,
        recompute=False,
    )
    assert views.image.flops == 2 * (tower.flops + heads)
    rows = 4 * 2 * 65 * width  # a class token's scores in each of four blocks
    assert views.wide_flops == whole.image.flops - 2 * width * 96 + 2 * projector + rows
    images = views.memory("DDP")["images"]
    assert images == 3 * whole.memory("DDP")["images"]
    doubled = 3 * (views.image.flops + views.text.flops) + views.loss_flops_per_pair
    assert views.flops_per_pair == doubled + views.wide_flops
    assert views.averaged
