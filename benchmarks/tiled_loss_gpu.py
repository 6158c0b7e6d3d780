"""Tiled losses beside the dense ones, open_clip's and Inf-CL's, on one GPU.

    python benchmarks/tiled_loss_gpu.py --out benchmarks/results/tiled_loss_gpu.md

All in one process and in turn, forward and backward, float32 features; once with TensorFloat-32
products, which are all that Inf-CL has, and once with float32's. open_clip and Inf-CL
(`pip install --no-deps open_clip_torch inf-cl`) take part where they are installed. Every loss is
first compared with the dense one in float64. The page is written after each row, and a row that
fails says with what.
"""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss

DATE = "2026-11-25"
WIDTH = 512
CHECKED_PAIRS = 4096
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def of_features(term: torch.nn.Module) -> Loss:
    return lambda image, text, scale, bias: term(
        PairFeatures(image_embed=image, text_embed=text, logit_scale=scale, logit_bias=bias)
    )


def inf_cl(image: Tensor, text: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    """Both directions, as a CLIP loss needs them."""
    from inf_cl import cal_flash_loss

    return (
        cal_flash_loss(image, text, scale=scale).mean()
        + cal_flash_loss(text, image, scale=scale).mean()
    ) / 2


def open_clip_softmax(image: Tensor, text: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(image, text, scale)


def open_clip_sigmoid(*inputs: Tensor) -> Tensor:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(*inputs)


def families(backends: list[str]) -> dict[str, dict[str, Loss]]:
    """Family -> name -> loss; the first of each is the dense one that others are checked by."""
    has_peer = importlib.util.find_spec("open_clip") is not None
    softmax = {"ours, dense": of_features(SoftmaxLoss())}
    sigmoid = {"ours, dense": of_features(SigmoidLoss())}
    for backend in backends:
        softmax[f"ours, tiled, {backend}"] = of_features(TiledSoftmaxLoss(backend=backend))
        sigmoid[f"ours, tiled, {backend}"] = of_features(TiledSigmoidLoss(backend=backend))
    if has_peer:
        softmax["open_clip ClipLoss"] = open_clip_softmax
        sigmoid["open_clip SigLipLoss"] = open_clip_sigmoid
    if importlib.util.find_spec("inf_cl"):
        softmax["Inf-CL, both directions"] = inf_cl
    return {"softmax": softmax, "sigmoid": sigmoid}


def inputs_of(pairs: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Unit-norm features, texts a quarter like their images; a scale of 50; a bias of -10."""
    generator = torch.Generator(device).manual_seed(0)
    image, other = (torch.randn(pairs, WIDTH, generator=generator, device=device) for _ in range(2))
    rows = [F.normalize(x, dim=-1) for x in (image, image + 4 * other)]
    values = [*rows, torch.tensor(50.0, device=device), torch.tensor(-10.0, device=device)]
    return [value.to(dtype).requires_grad_() for value in values]


def step(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs, materialize_grads=True)]


def error(loss: Loss, dense: Loss, device: torch.device, pairs: int) -> str:
    """The largest relative error of value and gradients, of norms."""
    exact = step(dense, inputs_of(pairs, device, torch.float64))
    found = step(loss, inputs_of(pairs, device, torch.float32))
    errors = [
        (ours.double() - theirs).norm() / theirs.norm()
        for ours, theirs in zip(found, exact, strict=True)
        if theirs.norm() > 0
    ]
    return f"{max(errors).item():.1e}"


def measured(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds, the fastest of rounds, and peak GiB beyond what is there; one more compiles."""
    before, times = torch.cuda.memory_allocated(), []
    for turn in range(rounds + 1):
        if turn == 1:
            torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return min(times[1:]), peak


def figures(loss: Loss, device: torch.device, pairs: int, rounds: int) -> tuple[float, float]:
    inputs = inputs_of(pairs, device, torch.float32)
    return measured(lambda: step(loss, inputs), rounds)


def attempt(make: Callable[[], object]) -> object:
    """What it makes, or the name of what it raised: one loss must not end the page."""
    try:
        return make()
    except Exception as failure:  # of any kind, of any kernel
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        torch.cuda.empty_cache()
        return type(failure).__name__


def row(
    name: str, loss: Loss, dense: Loss, given: argparse.Namespace, first: dict[int, float]
) -> str:
    """A line of the table; first: the first tiled loss's milliseconds, which ratios refer to."""
    cells = [name, str(attempt(lambda: error(loss, dense, given.device, CHECKED_PAIRS)))]
    for pairs in given.pairs:
        found = attempt(lambda pairs=pairs: figures(loss, given.device, pairs, given.rounds))
        if isinstance(found, str):
            cells.append(found)
            continue
        time, peak = found
        if name.startswith("ours, tiled"):
            first.setdefault(pairs, time)
        ratio = f" ({time / first[pairs]:.2f})" if pairs in first else ""
        cells.append(f"{time:.1f} ms{ratio}, {peak:.2f} GiB")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[16_384, 65_536, 262_144])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; benchmarks/tiled_loss.py is the CPU's")
    given.device = torch.device("cuda")
    lines = [
        "# Tiled losses on a GPU",
        "",
        f"{DATE}, one {torch.cuda.get_device_name()}. Python {platform.python_version()}, "
        f"torch {torch.__version__}. `python benchmarks/tiled_loss_gpu.py`",
        "",
        f"D = {WIDTH}, float32 features, scale 50; forward and backward, the fastest of "
        f"{given.rounds}, in turn in one process. In brackets the ratio to the first tiled loss; "
        f"GiB beyond the inputs. Error: the largest relative one of value and gradients at B = "
        f"{CHECKED_PAIRS:,}, to the dense loss in float64.",
    ]

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if given.out is not None:
            given.out.write_text("\n".join(lines) + "\n")

    backends = ["triton", "torch"] if importlib.util.find_spec("triton") else ["torch"]
    for precision, words in (("high", "TensorFloat-32"), ("highest", "float32")):
        torch.set_float32_matmul_precision(precision)
        for family, losses in families(backends).items():
            dense, first = losses["ours, dense"], {}
            ordered = sorted(losses.items(), key=lambda item: "tiled" not in item[0])
            say(f"\n## {family}, {words} products\n")
            say("| loss | error | " + " | ".join(f"B = {n:,}" for n in given.pairs) + " |")
            say("|---" * (2 + len(given.pairs)) + "|")
            for name, loss in ordered:
                say(row(name, loss, dense, given, first))


if __name__ == "__main__":
    main()
