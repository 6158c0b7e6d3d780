"""A-CLIP's loop: gradients of the cached step against everything at once, and a run of it.

Letters: B pairs of a rank, G pairs of all ranks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.check import composed
from pipeline.config import check
from pipeline.data.images import ImageTransform
from pipeline.data.three_views import ThreeViews
from pipeline.evals.trained import TrainedClip
from pipeline.formats.architecture import plain_weights
from pipeline.formats.transformers import Transformers
from pipeline.losses.byol import ByolLoss
from pipeline.losses.each_view import EachView
from pipeline.losses.objective import Objective
from pipeline.losses.simclr import SimCLRLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models.class_attention import class_attention
from pipeline.models.text import TextTransformer
from pipeline.models.views import Teacher, ViewsCLIP
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.attentive import AttentiveTokens, mapped
from pipeline.tokens.random import RandomTokens
from pipeline.tracking.metrics import read_metrics
from pipeline.trainer import attentive
from pipeline.trainer.attentive import AttentiveModule, attentive_inputs, averages, module_class
from pipeline.trainer.cached_step import CachedContrastiveStep, encoded, formula
from pipeline.trainer.captioner import train_captioner
from pipeline.trainer.module import ContrastiveModule
from pipeline.trainer.run import train
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy

WORLD, BATCH, MICRO_BATCHES = 2, 8, (1, 3, None)
WEIGHTS = {"byol": 2.0}


def model_of(seed: int = 0) -> ViewsCLIP:
    torch.manual_seed(seed)
    model = ViewsCLIP(
        image=VisionTransformer(image_size=16, patch_size=4, width=16, layers=2, heads=2),
        text=TextTransformer(vocab_size=30, context_length=6, width=16, layers=1, heads=2),
        embed_dim=8,
        hidden_ratio=1.5,
        projection_width=6,
        init_logit_scale=3.0,
    ).double()
    model.image.patch_embed.requires_grad_(False)
    return model


def batch_of(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rank `index`'s three crops, their boxes and captions."""
    generator = torch.Generator().manual_seed(20 + index)
    images = torch.randn(BATCH, 3, 3, 16, 16, generator=generator, dtype=torch.float64)
    start = torch.randint(0, 20, (BATCH, 2, 2), generator=generator)
    size = torch.randint(10, 40, (BATCH, 2, 2), generator=generator)
    low, high = start.amin(1), (start + size).amax(1)
    boxes = torch.cat([torch.cat([start, size], 2), torch.cat([low, high - low], 1)[:, None]], 1)
    tokens = torch.randint(1, 28, (BATCH, 6), generator=generator)
    return images, boxes, tokens


def inputs_of(index: int) -> tuple[Tensor | None, ...]:
    images, boxes, tokens = batch_of(index)
    teacher, average = Teacher(model_of()), model_of(seed=1)
    trained = {n: p for n, p in average.named_parameters() if p.requires_grad}
    weights = teacher.named(trained)
    policy = AttentiveTokens(keep=0.5)
    kept, target = attentive_inputs(teacher, weights, policy, images[:, 2], boxes, chunk=3)
    return images[:, :2], tokens, kept, None, target


def step_for(model: ViewsCLIP, micro_batch_size: int | None) -> CachedContrastiveStep:
    objective = Objective(
        terms={
            "clip": EachView(term=SoftmaxLoss()),
            "simclr": SimCLRLoss(temperature=0.1),
            "byol": ByolLoss(),
        },
        weights=WEIGHTS,
    )
    return CachedContrastiveStep(
        encode=lambda *chunk: encoded(model, objective, chunk, frozenset()),
        loss_scalars=model.loss_scalars,
        objective=formula(objective),
        micro_batch_size=micro_batch_size,
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def oracle(world: int) -> tuple[dict[str, Tensor], float]:
    """Every pair at once, the paper's sum of losses written out."""
    model = model_of()
    parts = zip(*(inputs_of(index) for index in range(world)), strict=True)
    images, tokens, kept, _, target = (None if p[0] is None else torch.cat(p) for p in parts)
    text = model.encode_text(tokens)
    clip, features = 0.0, []
    for view in range(2):
        image = model.encode_image(images[:, view], kept[:, view])
        logits = model.log_logit_scale.exp() * image @ text.T
        both = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
        clip = clip - 0.5 * both.mean() / 2
        features.append(model.image(images[:, view], kept[:, view]))
    z = F.normalize(torch.cat([model.ssl_head(x) for x in features]), dim=-1)
    scores = (z @ z.T / 0.1).masked_fill(torch.eye(len(z)).bool(), float("-inf"))
    partner = torch.arange(len(z)).roll(len(z) // 2)
    simclr = F.cross_entropy(scores, partner)
    byol = sum(
        (2 - 2 * F.cosine_similarity(model.predictor(model.projector(x)), target)).mean() / 2
        for x in features
    )
    loss = clip + simclr + 2 * byol
    loss.backward()
    return gradients_of(model), loss.item()


def assert_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    assert {name.partition(".")[0] for name in expected} >= {*ViewsCLIP.training_only}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_one_process_equals_the_oracle(micro_batch_size: int | None) -> None:
    expected, loss = oracle(1)
    model = model_of()
    logged = step_for(model, micro_batch_size)(*inputs_of(0))
    assert_equal(gradients_of(model), expected)
    assert list(logged) == ["loss", "clip", "simclr", "byol", "logit_scale"]
    assert logged["loss"].item() == pytest.approx(loss, rel=1e-9)


def test_the_oracle_can_tell() -> None:
    """No gradient is so small that a missing one would pass as equal."""
    expected, _ = oracle(1)
    weak = {name: g.abs().max().item() for name, g in expected.items() if g.abs().max() < 1e-3}
    assert not weak


def in_a_group(index: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=index, world_size=WORLD
    )
    found = []
    for micro_batch_size in (3, None):
        model = model_of()
        logged = step_for(model, micro_batch_size)(*inputs_of(index))
        found.append((logged["loss"], gradients_of(model)))
    torch.save(found, Path(directory) / f"{index}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_the_oracle(tmp_path: Path) -> None:
    expected, loss = oracle(WORLD)
    mp.spawn(in_a_group, args=(os.fspath(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{index}.pt") for index in range(WORLD)]
    for (loss_0, first), (loss_1, second) in zip(*ranks, strict=True):
        assert loss_0 != loss_1
        assert ((loss_0 + loss_1) / 2).item() == pytest.approx(loss, rel=1e-9)
        assert_equal({name: (first[name] + second[name]) / WORLD for name in first}, expected)


def test_patches_follow_the_average_and_the_boxes() -> None:
    images, boxes, _ = batch_of(0)
    model, average = model_of(), model_of(seed=1)
    average.image.patch_embed.load_state_dict(model.image.patch_embed.state_dict())  # frozen
    features, attention = class_attention(average.image, images[:, 2])
    _, _, kept, _, target = inputs_of(0)
    for view in range(2):
        wanted = AttentiveTokens(keep=0.5).from_attention(
            mapped(attention, boxes[:, view], boxes[:, 2])
        )
        assert torch.equal(kept[:, view], wanted)
    torch.testing.assert_close(target, average.projector(features), rtol=1e-9, atol=1e-12)
    assert kept.shape == (BATCH, 2, 12) and not target.requires_grad
    assert not torch.equal(kept[:, 0], kept[:, 1])
    teacher, everything = Teacher(model), AttentiveTokens(keep=1.0)
    assert attentive_inputs(teacher, {}, everything, images[:, 2], boxes, chunk=8)[0] is None


# A run


def words(data: Path, folder: Path) -> list[str]:
    return [
        "recipe=aclip_b16_yfcc15m",
        "debug=tiny",
        "name=views",
        f"runs_dir={folder}",
        f"data.shards={data}/shards",
        f"tokenizer.path={data}/tokenizer",
        "model.text.vocab_size=600",
        "samples_seen=128",
        "schedule.warmup_samples=32",
        "micro_batch_size=12",
        "checkpoint_every_steps=1",
        "keep_checkpoints=10",
    ]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps in micro-batches, with what the teacher was given."""
    folder, given = tmp_path_factory.mktemp("attentive"), []

    def recorded(teacher: Any, weights: Any, *rest: Any, **named: Any) -> Any:
        given.append({name: weight.clone() for name, weight in weights.items()})
        return attentive_inputs(teacher, weights, *rest, **named)

    cfg = composed("train", words(data, folder))
    check(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attentive, "attentive_inputs", recorded)
        return {"config": cfg, "given": given, "directory": train(cfg)}


def content_of(directory: Path, step: int) -> dict[str, Any]:
    path = directory / "checkpoints" / f"step-{step:08d}.ckpt"
    return torch.load(path, weights_only=True)


def test_it_trains_with_every_term_in_the_log(run: dict[str, Any]) -> None:
    rows = read_metrics(run["directory"])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        parts = [row[f"train/{name}"] for name in ("clip", "simclr", "byol")]
        assert all(part > 0 for part in parts) and row["train/skipped_steps"] == 0
        total = parts[0] + parts[1] + 2 * parts[2]
        assert row["train/loss"] == pytest.approx(total, rel=1e-5)


def test_the_teacher_is_the_average_of_the_step_before_once_a_step(run: dict[str, Any]) -> None:
    assert len(run["given"]) == 4  # not once a pass, nor once a micro-batch
    for step, weights in enumerate(run["given"][1:], 1):
        kept = content_of(run["directory"], step)["callbacks"]["Ema"]["weights"]
        assert "image.patch_embed.weight" not in weights and "projector.0.weight" in weights
        for name, weight in weights.items():
            assert torch.equal(weight, kept[name])
    last = content_of(run["directory"], 4)
    trained, average = last["state_dict"], last["callbacks"]["Ema"]["weights"]
    assert not torch.equal(average["projector.0.weight"], trained["model.projector.0.weight"])
    assert not any("teacher" in name for name in trained)


def test_a_resumed_run_is_bit_identical(run: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(run["directory"], tmp_path / "views")
    for step in (3, 4):
        (tmp_path / "views" / "checkpoints" / f"step-{step:08d}.ckpt").unlink()
    cfg = run["config"].copy()
    cfg.runs_dir = str(tmp_path)
    whole, resumed = content_of(run["directory"], 4), content_of(train(cfg), 4)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight)
    average = resumed["callbacks"]["Ema"]["weights"]
    for name, weight in whole["callbacks"]["Ema"]["weights"].items():
        assert torch.equal(average[name], weight)


def test_evaluation_and_export_know_one_view(run: dict[str, Any], tmp_path: Path) -> None:
    trained = TrainedClip.load(run["directory"], weights="ema")
    weights = plain_weights(trained.model)
    assert not any(name.startswith(ViewsCLIP.training_only) for name in weights)
    Transformers().write(trained, tmp_path)
    assert trained.model.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 96)


def test_a_captioner_on_its_tower_wants_one_crop(
    run: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    common = [
        f"run={run['directory']}",
        f"data.shards={data}/shards",
        f"runs_dir={tmp_path}",
        "name=captions",
        "samples_seen=32",
        "global_batch_size=32",
        "schedule.warmup_samples=0",
    ]
    with pytest.raises(ValueError, match=r"\+transform=clip transform\.image_size=32"):
        train_captioner(composed("train_captioner", common))
    one = ["name=again", "+transform=clip", "transform.image_size=32", "trainer.accelerator=cpu"]
    assert train_captioner(composed("train_captioner", [*common, *one])).is_dir()


@pytest.mark.slow
def test_two_processes_train_as_one(
    run: dict[str, Any], data: Path, tmp_path: Path, root: Path, environment: Any
) -> None:
    ddp = ["trainer.strategy=ddp", "trainer.devices=2"]
    command = [sys.executable, "-m", "pipeline.train", *words(data, tmp_path), *ddp]
    done = subprocess.run(
        command, cwd=root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = zip(read_metrics(run["directory"]), read_metrics(tmp_path / "views"), strict=True)
    for one, two in rows:
        for name in ("loss", "clip", "simclr", "byol", "grad_norm"):
            assert two[f"train/{name}"] == pytest.approx(one[f"train/{name}"], rel=1e-4)


# Mistakes


def test_half_of_it_is_refused() -> None:
    policy, views = AttentiveTokens(keep=0.5), ThreeViews(image_size=16)
    plain, model = ImageTransform(image_size=16), model_of()
    assert module_class(model, views, policy) is AttentiveModule
    assert module_class(nn.Identity(), plain, RandomTokens(keep=0.5)) is ContrastiveModule
    for parts, missing in (
        ((nn.Identity(), views, policy), "ViewsCLIP"),
        ((model, plain, policy), "transform=three_views"),
        ((model, views, None), "image_tokens=attentive"),
    ):
        with pytest.raises(ValueError, match=f"without .*{missing}"):
            module_class(*parts)


def test_it_needs_a_whole_average() -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    with pytest.raises(ValueError, match="ema=cosine"):
        averages(pl.Trainer(**options))
    with pytest.raises(ValueError, match="trainer=ddp"):
        averages(pl.Trainer(strategy=FullyShardedStrategy(), **options))
