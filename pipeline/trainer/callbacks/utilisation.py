"""perf/mfu: the share of the devices' peak that the model's own arithmetic takes."""

import logging

import lightning.pytorch as pl
import torch

from pipeline.cost.phase import PEAK_FLOPS, phase_cost

log = logging.getLogger(__name__)

SAME_AS = {"H200": "H100"}  # the same chip with other memory


class Utilisation(pl.Callback):
    """peak_flops: of one device, in FLOP/s; null: known for A100, H100, H200 (bf16), else none.

    Counts forward and backward of what a pair's tokens cost, once, and nothing that is computed
    twice (PaLM, arXiv:2204.02311, app. B). Price: some seconds at the start, on shapes alone.
    """

    def __init__(self, *, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"callbacks.utilisation.peak_flops={peak_flops}: above 0, or null")
        self.peak_flops = peak_flops

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peak = self.peak_flops or peak_of(pl_module.device)
        if peak is None or not trainer.is_global_zero:
            return
        cost = phase_cost(pl_module.phase, trainer.world_size)
        pl_module.flops_per_pair, pl_module.peak_flops = cost.model_flops_per_pair, peak


def peak_of(device: torch.device) -> float | None:
    """bf16 FLOP/s of a device we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, as_known in {**{k: k for k in PEAK_FLOPS}, **SAME_AS}.items():
        if known in name:
            return PEAK_FLOPS[as_known]
    log.info("no perf/mfu: the peak of a %s is unknown; callbacks.utilisation.peak_flops=...", name)
    return None
