"""The cached contrastive step beside a plain step, GradCache's way and open_clip's accumulation.

    OMP_NUM_THREADS=1 python benchmarks/cached_step.py > benchmarks/results/cached_step.md

CPU seconds of one thread for forward, loss and backward, medians; the ways take turns in one
process on the same weights and batch. The two others are written from their descriptions: GradCache
(arXiv:2101.06983) embeds every micro-batch without a graph and every one again with it; open_clip's
--accum-freq k embeds all without a graph, then evaluates k losses, each with one micro-batch live.
Peak memory: each way in a process of its own, the most resident memory beyond what weights,
gradients and batch need.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.losses.features import PairFeatures
from pipeline.losses.objective import Objective
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.random import RandomTokens
from pipeline.trainer.cached_step import CachedContrastiveStep, encoded, formula, scalars

DATE, MACHINE = "2026-11-25", "2 cores of a shared x86-64 server"
BATCH, SHARE = 64, 8  # pairs, and micro-batches of a step
IMAGE, PATCH, WIDTH, LAYERS, LENGTH = 128, 16, 384, 12, 32
Batch = tuple[Tensor, Tensor, Tensor]


def setting(pairs: int) -> tuple[CLIP, Batch]:
    """A ViT-S with its batch; half of the patches are dropped."""
    torch.manual_seed(0)
    model = CLIP(
        image=VisionTransformer(
            image_size=IMAGE, patch_size=PATCH, width=WIDTH, layers=LAYERS, heads=6
        ),
        text=TextTransformer(
            vocab_size=1000, context_length=LENGTH, width=WIDTH, layers=LAYERS, heads=6
        ),
        embed_dim=256,
    )
    images, tokens = torch.randn(pairs, 3, IMAGE, IMAGE), torch.randint(1, 999, (pairs, LENGTH))
    kept = RandomTokens(keep=0.5).kept(pairs, model.image.num_tokens, torch.Generator())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, (images, tokens, kept)


def loss_of(model: CLIP, image_embed: Tensor, text_embed: Tensor) -> Tensor:
    return SoftmaxLoss()(
        PairFeatures(image_embed=image_embed, text_embed=text_embed, logit_scale=model.logit_scale)
    )


def ours(model: CLIP, batch: Batch, micro: int) -> None:
    objective = Objective(terms={"softmax": SoftmaxLoss()})
    names = scalars(model, objective)
    CachedContrastiveStep(
        encode=lambda *chunk: encoded(model, objective, chunk, names),
        loss_scalars=model.loss_scalars,
        objective=formula(objective),
        micro_batch_size=micro,
    )(*batch)


def plain(model: CLIP, batch: Batch, micro: int) -> None:
    loss_of(model, *model(*batch)).backward()


def chunks_of(batch: Batch, micro: int) -> list[Batch]:
    return list(zip(*(rows.split(micro) for rows in batch), strict=True))


def grad_cache(model: CLIP, batch: Batch, micro: int) -> None:
    chunks = chunks_of(batch, micro)
    with torch.no_grad():
        parts = [model(*chunk) for chunk in chunks]
    leaves = [torch.cat(part).requires_grad_() for part in zip(*parts, strict=True)]
    loss_of(model, *leaves).backward()
    gradients = zip(*(leaf.grad.split(micro) for leaf in leaves), strict=True)
    for chunk, gradient in zip(chunks, gradients, strict=True):
        embeds = model(*chunk)
        sum((e * g).sum() for e, g in zip(embeds, gradient, strict=True)).backward()


def accumulation(model: CLIP, batch: Batch, micro: int) -> None:
    chunks = chunks_of(batch, micro)
    with torch.no_grad():
        parts = [model(*chunk) for chunk in chunks]
    for index, chunk in enumerate(chunks):
        live = [*parts[:index], model(*chunk), *parts[index + 1 :]]
        loss_of(model, *(torch.cat(part) for part in zip(*live, strict=True))).backward()


WAYS: dict[str, tuple[Callable[[CLIP, Batch, int], None], int, int]] = {
    "a plain step of all pairs": (plain, BATCH, BATCH),
    "a plain step of one micro-batch": (plain, BATCH // SHARE, BATCH // SHARE),
    "ours": (ours, BATCH, BATCH // SHARE),
    "GradCache's way": (grad_cache, BATCH, BATCH // SHARE),
    "open_clip's accumulation": (accumulation, BATCH, BATCH // SHARE),
}


def peak_mib() -> float:
    """Of this process's own memory; getrusage would count its parent's, before exec."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


def memory(way: str) -> None:
    """Print the peak beyond what is there before the step; run in a process of its own."""
    torch.set_num_threads(1)
    step, pairs, micro = WAYS[way]
    model, batch = setting(BATCH)  # the same batch lies there in every way
    # the first matrix products load libraries; they are not the step's
    plain(model, tuple(rows[:1] for rows in batch), 1)
    before = peak_mib()
    step(model, tuple(rows[:pairs] for rows in batch), micro)
    print(peak_mib() - before)


def peak_of(way: str) -> float:
    """MiB. Blocks from 64 KiB on go back to the system at once: what is in use is counted, not the
    holes between.
    """
    words = [sys.executable, __file__, "--memory", way]
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.check_output(words, text=True, env=exact))


def gradients_of(model: CLIP, step: Callable[[CLIP, Batch, int], None], batch: Batch) -> list:
    for parameter in model.parameters():
        parameter.grad.zero_()
    step(model, batch, BATCH // SHARE)
    return [(name, parameter.grad.clone()) for name, parameter in model.named_parameters()]


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--memory", choices=list(WAYS))
    given = arguments.parse_args()
    if given.memory:
        memory(given.memory)
        return
    model, batch = setting(BATCH)
    expected = gradients_of(model, plain, batch)
    errors = {}
    for way, step in (("ours", ours), ("GradCache's way", grad_cache)):
        found = gradients_of(model, step, batch)
        errors[way] = max(
            float((a - b).norm() / b.norm()) for (_, a), (_, b) in zip(found, expected, strict=True)
        )
    scale = dict(gradients_of(model, accumulation, batch))["log_logit_scale"]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way, (step, pairs, micro) in WAYS.items():
            rows = tuple(part[:pairs] for part in batch)
            started = time.process_time()
            step(model, rows, micro)
            times[way].append(time.process_time() - started)
    seconds = {way: statistics.median(found) for way, found in times.items()}
    peaks = {way: peak_of(way) for way in WAYS}
    whole, one = seconds["a plain step of all pairs"], peaks["a plain step of one micro-batch"]
    print(
        f"""# The cached contrastive step

{DATE}, {MACHINE}, one thread. Python {platform.python_version()}, torch {torch.__version__}.
`OMP_NUM_THREADS=1 python benchmarks/cached_step.py`

ViT-S/16 at {IMAGE} pixels (half of the patches) and a text tower of {LENGTH} positions, both of
width {WIDTH} and {LAYERS} layers, fp32; {BATCH} pairs in {SHARE} micro-batches. Medians of
{given.rounds} rounds, in turns in one process; peaks, beyond weights, gradients and batch, in
processes of their own. Arithmetic: 1 + 7/24 = 1.29 with the last graph used again, 4/3 without.

| way | CPU seconds | of all pairs' plain step | peak MiB | of one micro-batch's plain step |
|---|---|---|---|---|"""
    )
    for way in WAYS:
        ratio = "" if way == "a plain step of one micro-batch" else f"{seconds[way] / whole:.2f}"
        peak = f"{peaks[way]:.0f} | {peaks[way] / one:.2f}"
        print(f"| {way} | {seconds[way]:.2f} | {ratio} | {peak} |")
    ratio = float(scale / dict(expected)["log_logit_scale"])
    print(
        f"""
Largest relative difference of a parameter's gradient to the plain step's: ours
{errors["ours"]:.1e}, GradCache's way {errors["GradCache's way"]:.1e}. open_clip's accumulation
gives {ratio:.2f} times the gradient of the logit scale."""
    )


if __name__ == "__main__":
    main()
