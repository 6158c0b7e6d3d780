"""perf/mfu: the share of the devices' peak that the model's own arithmetic takes."""

import logging

import lightning.pytorch as pl
import torch

from pipeline.cost.phase import PEAK_FLOPS, phase_cost

log = logging.getLogger(__name__)

# bf16 without sparsity, the vendor's figures, by what a device's name contains: the longest counts
PEAKS = {
    **PEAK_FLOPS,
    "A800": PEAK_FLOPS["A100"],  # these three: the same chip with other memory or links
    "H200": PEAK_FLOPS["H100"],
    "H800": PEAK_FLOPS["H100"],
    "H100 PCIe": 756e12,
    "H800 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
}


class Utilisation(pl.Callback):
    """peak_flops: of one device, in FLOP/s; null: known for A100, H100, H200 and what is sold
    like them (bf16), else none.

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
    known = [word for word in PEAKS if word in name]
    if known:
        return PEAKS[max(known, key=len)]
    log.info("no perf/mfu: the peak of a %s is unknown; callbacks.utilisation.peak_flops=...", name)
    return None
