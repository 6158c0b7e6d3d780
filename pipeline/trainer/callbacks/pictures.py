"""Pictures of a step's batch while a run goes on: for the run's page and for W&B."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.config import build
from pipeline.evals.trained import shortened
from pipeline.shards import whole_file
from pipeline.tracking.pictures import (
    kept_patches_sheet,
    negatives_sheet,
    retrieval_sheet,
    seen_only,
)
from pipeline.tracking.wandb import SteadyWandb
from pipeline.trainer.callbacks.periodic import Periodic, modes_restored

log = logging.getLogger(__name__)


class Pictures(Periodic):
    """every_samples: see Periodic.  pairs: of rank 0's batch that are looked at.

    runs/N/media/SAMPLES-WHAT.png: `retrieval` (captions nearest to images), `nearest-negatives`
    (what the loss pushes apart, the likeliest false negatives first), `kept-patches` (where image
    tokens are dropped). Embedded without dropping, in evaluation mode, by rank 0 alone; the run
    stays the same to the bit. For one process and DDP. A letter that matplotlib's font lacks is a
    box in its caption, without a warning.
    Price: a forward of `pairs`, and two seconds of drawing, each time.
    """

    name = "pictures"

    def __init__(self, *, every_samples: int, pairs: int = 128) -> None:
        super().__init__(every_samples)
        if pairs < 2:
            raise ValueError(f"callbacks.pictures.pairs={pairs}: at least 2")
        self.pairs = pairs
        self.kept: Tensor | None = None

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> bool:
        return trainer.is_global_zero and super().due(trainer, pl_module, step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Which patches this step keeps is known before it alone: its number goes up with it."""
        if self.due(trainer, pl_module, trainer.global_step + 1):
            self.kept = pl_module.inputs(batch)[2]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self.due(trainer, pl_module, trainer.global_step):
            return
        kept, self.kept = self.kept, None
        seen = pl_module.phase.samples_at(trainer.global_step)
        sheets = self._sheets(pl_module, batch, kept)
        folder = Path(trainer.default_root_dir) / "media"
        for name, sheet in sheets.items():
            path = folder / f"{seen:012d}-{name}.png"
            try:
                with whole_file(path) as file, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Glyph .* missing from font")
                    sheet.savefig(file, format="png", dpi=80)
            except (OSError, ValueError) as error:  # a full disk: no reason to end
                log.warning("%s is not written: %s", path, error)
                return
            for logger in trainer.loggers:
                if isinstance(logger, SteadyWandb):
                    logger.picture(f"media/{name}", path, seen)

    @torch.inference_mode()
    def _sheets(
        self, pl_module: pl.LightningModule, batch: Any, kept: Tensor | None
    ) -> dict[str, Figure]:
        model, config = pl_module.model, pl_module.phase.config
        pixels = batch["images"][: self.pairs]
        if pixels.ndim == 5:  # views of an image: the first
            pixels = pixels[:, 0]
        captions = batch["captions"][: self.pairs]
        tokenizer = build(config.tokenizer, **shortened(config))
        with modes_restored(model):
            model.eval()
            image_embed = model.encode_image(pl_module.transform.normalise(pixels))
            text_embed = model.encode_text(tokenizer(captions).to(pl_module.device))
        similarity, pixels = model.similarity(image_embed, text_embed).float().cpu(), pixels.cpu()
        sheets = {
            "retrieval": retrieval_sheet(pixels, captions, similarity),
            "nearest-negatives": negatives_sheet(pixels, captions, similarity),
        }
        if kept is not None:
            own = (kept[:, 0] if kept.ndim == 3 else kept).cpu()
            patches = model.image.num_tokens
            paled = [seen_only(x, rows, patches) for x, rows in zip(pixels, own, strict=False)]
            sheets["kept-patches"] = kept_patches_sheet(paled)
        return sheets
