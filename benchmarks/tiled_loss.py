"""Tiled losses beside the dense ones, ours and open_clip's, on a CPU.

    OMP_NUM_THREADS=1 .venv-peer/bin/python -m benchmarks.tiled_loss

runs in the environment of `make peer`, all in one process and in turn, and writes
benchmarks/results/tiled_loss.md. Times are CPU seconds of one thread. For a GPU, with Inf-CL
beside, there is `benchmarks/tiled_loss_gpu.py`.
`python -m benchmarks.tiled_loss peak NAME` is one process that measures its peak memory.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from pipeline.losses.features import PairFeatures
from pipeline.losses.sigmoid import SigmoidLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.tiled_sigmoid import TiledSigmoidLoss
from pipeline.losses.tiled_softmax import TiledSoftmaxLoss

RESULT = Path(__file__).parent / "results" / "tiled_loss.md"
WIDTH = 512
SAVED_PAIRS = 32_768
PEAK_PAIRS = 8_192
ROUNDS = 3
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def of_features(term: torch.nn.Module) -> Loss:
    return lambda image, text, scale, bias: term(
        PairFeatures(image_embed=image, text_embed=text, logit_scale=scale, logit_bias=bias)
    )


# family -> name -> loss; the first is what ratios refer to
FAMILIES: dict[str, dict[str, Loss]] = {
    "softmax": {
        "ours, tiled": of_features(TiledSoftmaxLoss()),
        "ours, dense": of_features(SoftmaxLoss()),
        "open_clip ClipLoss": lambda image, text, scale, _: ClipLoss()(image, text, scale),
    },
    "sigmoid": {
        "ours, tiled": of_features(TiledSigmoidLoss()),
        "ours, dense": of_features(SigmoidLoss()),
        "open_clip SigLipLoss": lambda *inputs: SigLipLoss()(*inputs),
    },
}


def inputs_of(pairs: int, device: str) -> list[Tensor]:
    """Unit-norm features, a scale of 50, a bias of -10, as leaves."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=-1) for _ in range(2)]
    values = [*rows, torch.tensor(50.0), torch.tensor(-10.0)]
    return [value.to(device).requires_grad_() for value in values]


def step(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs, materialize_grads=True)]


def cpu_seconds(loss: Loss, inputs: list[Tensor]) -> float:
    start = time.process_time()
    step(loss, inputs)
    return time.process_time() - start


def saved_mebibytes(loss: Loss) -> float:
    """What autograd keeps for the backward, each storage once; on the meta device."""
    inputs = [
        torch.empty(shape, device="meta", requires_grad=True)
        for shape in [(SAVED_PAIRS, WIDTH)] * 2 + [()] * 2
    ]
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(*inputs)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    return sum(storages.values()) / 2**20


def resident_mebibytes(field: str) -> float:
    """VmRSS: now; VmHWM: the most since the process began or clear_refs was written."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith(field)) / 1024


def print_peak(family: str, name: str) -> None:
    """Peak resident memory of forward and backward beyond what the inputs and torch take."""
    inputs = inputs_of(PEAK_PAIRS, "cpu")
    step(FAMILIES[family][name], [x[:64] if x.ndim else x for x in inputs])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mebibytes("VmRSS")
    step(FAMILIES[family][name], inputs)
    print(resident_mebibytes("VmHWM") - before)


def peak_mebibytes(family: str, name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.tiled_loss", "peak", json.dumps([family, name])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def cpu_tables() -> list[str]:
    lines = []
    for family, losses in FAMILIES.items():
        lines += [f"## {family}, CPU", ""]
        lines += ["CPU seconds of forward and backward (ratio to the tiled loss).", ""]
        lines += ["| pairs | " + " | ".join(losses) + " |", "|---" * (len(losses) + 1) + "|"]
        for pairs in (2048, 4096, 8192):
            inputs = inputs_of(pairs, "cpu")
            results = [step(loss, inputs) for loss in losses.values()]
            for result in results[1:]:
                for ours, theirs in zip(results[0], result, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
            rounds = [
                [cpu_seconds(loss, inputs) for loss in losses.values()] for _ in range(ROUNDS)
            ]
            best = [min(times) for times in zip(*rounds, strict=True)]
            cells = [f"{seconds:.2f} ({seconds / best[0]:.2f})" for seconds in best]
            lines.append(f"| {pairs:,} | " + " | ".join(cells) + " |")
        lines += ["", f"| | saved for the backward, MiB (B = {SAVED_PAIRS:,}) | ratio | "]
        lines[-1] += f"peak memory beyond the inputs, MiB (B = {PEAK_PAIRS:,}) |"
        lines.append("|---|---|---|---|")
        saved = {name: saved_mebibytes(loss) for name, loss in losses.items()}
        for name, size in saved.items():
            ratio = size / saved["ours, tiled"]
            peak = peak_mebibytes(family, name)
            lines.append(f"| {name} | {size:,.1f} | {ratio:.0f} | {peak:,.0f} |")
        lines.append("")
    return lines


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        print_peak(*json.loads(sys.argv[2]))
        return
    lines = [
        "# Tiled losses",
        "",
        f"2026-11-26, 2 cores of a shared x86-64 server, one thread. Python "
        f"{platform.python_version()}, torch {torch.__version__}, open_clip "
        f"{open_clip.__version__}. `OMP_NUM_THREADS=1 .venv-peer/bin/python -m "
        "benchmarks.tiled_loss`",
        "",
        f"D = {WIDTH}, float32, scale 50, one process, all losses in turn in it, best of {ROUNDS}; "
        "values and all gradients agree (asserted, 2e-5 + 2e-4 relative). Saved bytes count each "
        "storage once.",
        "",
        *cpu_tables(),
        "On a GPU, with Inf-CL beside: `benchmarks/tiled_loss_gpu.py`; not run yet, no CUDA device "
        "was to be had.",
        "",
    ]
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
