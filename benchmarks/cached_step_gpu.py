"""The cached contrastive step on one GPU, beside a plain step and the two other ways.

    python benchmarks/cached_step_gpu.py [--batch 2048] [--micro 256] [--out FILE]

ViT-B/16 with half of the patches and 77 text positions, bf16 autocast; milliseconds of the device,
the fastest round, all ways in turns in one process, and the most memory beyond weights, gradients
and batch. The ways are those of benchmarks/cached_step.py.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cached_step import Batch, accumulation, grad_cache, ours, plain
from benchmarks.tiled_loss_gpu import measured
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.random import RandomTokens

DATE = "2026-11-25"


def setting(pairs: int, device: torch.device) -> tuple[CLIP, Batch]:
    """ViT-B/16 with its batch."""
    torch.manual_seed(0)
    model = CLIP(
        image=VisionTransformer(image_size=224, patch_size=16, width=768, layers=12, heads=12),
        text=TextTransformer(vocab_size=49408, context_length=77, width=512, layers=12, heads=8),
        embed_dim=512,
    ).to(device)
    images = torch.randn(pairs, 3, 224, 224, device=device)
    tokens = torch.randint(1, 49406, (pairs, 77), device=device)
    kept = RandomTokens(keep=0.5).kept(pairs, model.image.num_tokens, torch.Generator())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, (images, tokens, kept.to(device))


def scale_gradient(model: CLIP, step: Callable[[], None]) -> Tensor:
    for parameter in model.parameters():
        parameter.grad.zero_()
    step()
    return model.log_logit_scale.grad.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; benchmarks/cached_step.py is the CPU's")
    model, batch = setting(given.batch, torch.device("cuda"))

    def way(step: Callable[[CLIP, Batch, int], None], pairs: int) -> Callable[[], None]:
        rows = tuple(part[:pairs] for part in batch)

        def run() -> None:
            # as a trainer does: the whole step in one context
            with torch.autocast("cuda", torch.bfloat16):
                step(model, rows, given.micro)

        return run

    ways = {
        "a plain step of one micro-batch": way(plain, given.micro),
        "a plain step of all pairs": way(plain, given.batch),
        "ours": way(ours, given.batch),
        "GradCache's way": way(grad_cache, given.batch),
        "open_clip's accumulation": way(accumulation, given.batch),
    }
    lines = [
        "# The cached contrastive step on a GPU",
        "",
        f"{DATE}, one {torch.cuda.get_device_name()}. Python {platform.python_version()}, torch "
        f"{torch.__version__}. `python benchmarks/cached_step_gpu.py --batch {given.batch} "
        f"--micro {given.micro}`",
        "",
        "ViT-B/16, half of the patches, 77 text positions, bf16 autocast; the fastest of "
        f"{given.rounds}, GiB beyond weights, gradients and batch.",
        "",
        "| way | ms | pairs/s | GiB | gradient of the logit scale |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name, step in ways.items():
        pairs = given.micro if "micro-batch" in name else given.batch
        try:
            milliseconds, peak = measured(step, given.rounds)
            gradient = "" if pairs < given.batch else f"{scale_gradient(model, step).item():.3e}"
            cells = [f"{milliseconds:.1f}", f"{1000 * pairs / milliseconds:.0f}", f"{peak:.2f}"]
            lines.append(f"| {name} | {' | '.join(cells)} | {gradient} |")
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            lines.append(f"| {name} | out of memory | | | |")
        print(lines[-1], flush=True)
        if given.out is not None:
            given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
