"""What an optimizer's step costs on a CPU: ours beside torch's default, on six ViT-B blocks.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py > benchmarks/results/optimizers.md

CPU seconds of one thread, medians; the contestants take turns in one process, each with its own
parameters and state. Muon's iteration is in bfloat16, which CPUs of this kind do slowly: its row
says nothing about GPUs.
"""

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.models.transformer import Transformer
from pipeline.optim.adafactor import Adafactor
from pipeline.optim.adamw import AdamW
from pipeline.optim.lamb import Lamb
from pipeline.optim.muon import Muon

LAYERS, WIDTH, ROUNDS, WARMUP = 6, 768, 5, 2
DATE = "2026-11-25"
MACHINE = "2 cores of a shared x86-64 server"
CONTESTANTS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch.optim.AdamW, its default (a loop)": lambda model: torch.optim.AdamW(model.parameters()),
    "adamw fused=false": AdamW(lr=1e-3, fused=False).make,
    "adamw (fused)": AdamW(lr=1e-3).make,
    "lamb": Lamb(lr=1e-3).make,
    "adafactor": Adafactor(lr=1e-2).make,
    "muon": Muon(lr=1e-3).make,
}


def contestant(make: Callable[[nn.Module], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimizer with parameters and gradients of its own."""
    torch.manual_seed(0)
    model = Transformer(width=WIDTH, layers=LAYERS, heads=12)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return make(model)


def main() -> None:
    torch.set_num_threads(1)
    optimizers = {name: contestant(make) for name, make in CONTESTANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(WARMUP + ROUNDS):
        for name, optimizer in optimizers.items():
            gc.collect()
            started = time.process_time()
            optimizer.step()
            if turn >= WARMUP:
                seconds[name].append(time.process_time() - started)
    first = next(iter(optimizers.values()))
    count = sum(p.numel() for group in first.param_groups for p in group["params"])
    state = {
        name: sum(v.numel() for s in o.state.values() for v in s.values()) / count
        for name, o in optimizers.items()
    }
    base = statistics.median(seconds[next(iter(seconds))])
    print(f"""# The optimizer's step on a CPU

{DATE}, {MACHINE}, one thread, Python {platform.python_version()}, torch {torch.__version__}.
`OMP_NUM_THREADS=1 python benchmarks/optimizers.py`

{count / 1e6:.1f} M parameters ({LAYERS} blocks of width {WIDTH}), float32; median of {ROUNDS} steps
in turns. State: numbers kept per parameter.

| optimizer | CPU ms | against torch's default AdamW | state |
|---|---|---|---|""")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median * 1e3:.0f} | {median / base:.2f}x | {state[name]:.2f} |")
    print(
        "\nMuon's iteration is in bfloat16, which CPUs of this kind do slowly: "
        "its row says nothing about GPUs."
    )


if __name__ == "__main__":
    main()
