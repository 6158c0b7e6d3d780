"""Forward, loss and backward of a CLIP step: ours beside open_clip's, and what dropped tokens save.

    make peer
    .venv-peer/bin/python benchmarks/step.py [--batch 64] [--repeats 3] [--threads 1] [--out FILE]

Both have the same weights, batch, precision (fp32) and loss, and turns alternate in one process;
the figure is the fastest turn's CPU time (wall-clock with more than one thread). On a GPU it is
wall-clock of bf16, with operations a second and the most memory beside; give it a batch of 512.
open_clip drops patches by its own PatchDropout, which keeps as many. Text is 77 positions wide, or
cut to 16 as CLIPA does. A step of the image tower alone has the sum of its features for a loss.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as PeerClip
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.formats.names import OPEN_CLIP
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.tokens.random import RandomTokens

DATE = "2026-11-25"
MACHINE = "2 cores of a shared x86-64 server"
IMAGE = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
TEXT = {"vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
CASES = [  # part, share of patches, text positions, speed-up asked for
    ("whole step", 1.0, 77, None),
    ("whole step", 0.5, 77, 1.6),
    ("whole step", 0.25, 77, 2.5),
    ("whole step", 0.25, 16, 3.4),
    ("image tower", 1.0, 77, None),
    ("image tower", 0.5, 77, 1.9),
    ("image tower", 0.25, 77, 3.6),
]
Embed = Callable[[], tuple[Tensor, Tensor | None]]


def models(keep: float, length: int, device: str) -> tuple[CLIP, PeerClip]:
    """Ours and theirs, with the same weights."""
    vision = IMAGE | {"head_width": 64, "patch_dropout": 1 - keep}
    peer = PeerClip(512, vision, TEXT | {"context_length": length}).to(device).train()
    ours = CLIP(
        image=VisionTransformer(**IMAGE, heads=12),
        text=TextTransformer(**TEXT, context_length=length),
        embed_dim=512,
    )
    theirs = peer.state_dict()
    ours.load_state_dict({name: OPEN_CLIP.read(theirs, name)[0] for name in ours.state_dict()})
    return ours.to(device), peer


def loss(image_embed: Tensor, text_embed: Tensor | None, scale: Tensor) -> Tensor:
    if text_embed is None:
        return image_embed.float().square().sum()
    logits = scale * image_embed.float() @ text_embed.float().T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def turn(model: torch.nn.Module, embed: Embed, scale: Callable[[], Tensor], clock: str) -> float:
    model.zero_grad(set_to_none=True)
    if clock == "cuda":
        torch.cuda.synchronize()
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    cast = torch.autocast("cuda", torch.bfloat16) if clock == "cuda" else nullcontext()
    with cast:
        embeds = embed()
    loss(*embeds, scale()).backward()
    if clock == "cuda":
        torch.cuda.synchronize()
    return now() - start


def on_device(run: Callable[[], float]) -> str:
    """TFLOP/s and peak GiB of a turn on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    seconds = run()
    peak = torch.cuda.max_memory_allocated() / 2**30
    with FlopCounterMode(display=False) as counter:
        run()
    return f"{counter.get_total_flops() / seconds / 1e12:.0f} TFLOP/s, {peak:.1f} GiB"


def measure(
    part: str, keep: float, length: int, *, batch: int, repeats: int, clock: str
) -> tuple[float, float, str]:
    """Seconds of ours and of theirs, each its fastest turn; the first of each warms up. And what
    else a GPU tells of them.
    """
    device = "cuda" if clock == "cuda" else "cpu"
    torch.manual_seed(0)
    ours, peer = models(keep, length, device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    tokens = torch.randint(1, 49406, (batch, length), device=device)
    tokens[:, -1] = 49407
    policy = RandomTokens(keep=keep)

    def our_embed() -> tuple[Tensor, Tensor | None]:
        kept = policy.from_noise(torch.rand(batch, ours.image.num_tokens, device=device))
        if part == "image tower":
            return ours.image(images, kept), None
        return ours(images, tokens, kept)

    def their_embed() -> tuple[Tensor, Tensor | None]:
        if part == "image tower":
            return peer.encode_image(images), None
        return peer.encode_image(images, True), peer.encode_text(tokens, True)

    if keep == 1 and part == "whole step":
        with torch.no_grad():
            for mine, theirs in zip(our_embed(), their_embed(), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)
    times: tuple[list[float], list[float]] = ([], [])

    def our_turn() -> float:
        return turn(ours, our_embed, lambda: ours.logit_scale, clock)

    def their_turn() -> float:
        return turn(peer, their_embed, lambda: peer.logit_scale.exp(), clock)

    for _ in range(1 + repeats):
        times[0].append(our_turn())
        times[1].append(their_turn())
    more = f"{on_device(our_turn)}; {on_device(their_turn)}" if clock == "cuda" else ""
    return min(times[0][1:]), min(times[1][1:]), more


def table(batch: int, repeats: int, clock: str) -> list[str]:
    lines = [
        "| part | patches kept | text positions | ours, images/s | open_clip, images/s "
        "| ours / open_clip | ours / ours with all | asked for |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if clock == "cuda":
        lines = [lines[0] + " on the device: ours; open_clip |", lines[1] + "---|"]
    whole: dict[str, float] = {}
    for part, keep, length, wanted in CASES:
        ours, theirs, more = measure(part, keep, length, batch=batch, repeats=repeats, clock=clock)
        whole.setdefault(part, ours)
        lines.append(
            f"| {part} | {keep:g} | {length if part == 'whole step' else ''} "
            f"| {batch / ours:.2f} | {batch / theirs:.2f} | {theirs / ours:.2f} "
            f"| {whole[part] / ours:.2f} | {'' if wanted is None else f'>= {wanted}'} |"
            + (f" {more} |" if more else "")
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = "cuda" if torch.cuda.is_available() else "cpu" if given.threads == 1 else "wall"
    machine = torch.cuda.get_device_name() if clock == "cuda" else MACHINE
    print("\n".join(lines := [*head(given, machine, clock), ""]))
    lines += table(given.batch, given.repeats, clock)
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


def head(given: argparse.Namespace, machine: str, clock: str) -> list[str]:
    unit = {"cpu": "CPU time", "wall": "wall-clock", "cuda": "wall-clock, bf16"}[clock]
    patches = math.prod([IMAGE["image_size"] // IMAGE["patch_size"]] * 2)
    return [
        "# One step of ViT-B/16, ours beside open_clip's",
        "",
        f"{DATE}, {machine}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"open_clip {open_clip.__version__}. Batch {given.batch}, {patches} patches an image, "
        f"{given.threads} thread(s), {unit}, the fastest of {given.repeats}.",
        f"`benchmarks/step.py --batch {given.batch} --repeats {given.repeats} "
        f"--threads {given.threads}`",
    ]


if __name__ == "__main__":
    main()
