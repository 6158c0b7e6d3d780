"""Features of a proxy CLIP: any checkpoint of ours scores the pool that the next model is chosen
from.

Price: one forward of both towers per pair. A proxy trained on the pool itself has seen the wrong
pairs too; scores of
its own training pairs are inflated the more, the longer it trained.
"""

from typing import Any

import pyarrow as pa
import torch

from pipeline.evals.trained import TrainedClip, newest_checkpoint


class Embed:
    """run: a run directory of pipeline.train; its newest checkpoint is used, and named by its
    content.

    Columns: image_embed and text_embed, (D,) float32 of unit norm; clip_score, their inner product.
    threads: torch threads in each worker process.
    allow_foreign_targets: whether the run's config may name classes that are not ours.
    """

    name, version = "embed", 1
    needs_images, reads = True, ("caption",)
    operational = ("batch_size", "threads", "allow_foreign_targets")

    def __init__(
        self,
        *,
        run: str,
        batch_size: int = 256,
        threads: int = 1,
        allow_foreign_targets: bool = False,
    ):
        if batch_size < 1 or threads < 1:
            raise ValueError(f"batch_size={batch_size}, threads={threads}: both at least 1")
        self.run, self.batch_size, self.threads = run, batch_size, threads
        vector = pa.list_(pa.float32())
        self.allow_foreign_targets = allow_foreign_targets
        self.columns = {
            "image_embed": vector,
            "text_embed": vector,
            "clip_score": pa.float32(),
        }
        self.checkpoint = str(newest_checkpoint(run))
        self.inputs = {"run": self.checkpoint}
        self._model: TrainedClip | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # each worker loads its own

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Embed both sides of every sample."""
        if self._model is None:
            torch.set_num_threads(self.threads)
            self._model = TrainedClip.load(
                self.run,
                checkpoint=self.checkpoint,
                allow_foreign_targets=self.allow_foreign_targets,
            )
            if not self._model.metric.inner:
                name = self._model.metric.name
                raise ValueError(
                    f"annotate.embed.run={self.run} has model.metric {name}, and scores and "
                    "selections here are of cosines: give a run without metric="
                )
        images = self._model.image_embed(
            [sample["image"] for sample in batch], batch_size=self.batch_size
        )
        captions = [sample["caption"] for sample in batch]
        texts = self._model.text_embed(captions, batch_size=self.batch_size)
        scores = (images * texts).sum(1)
        return [
            {"image_embed": image, "text_embed": text, "clip_score": score}
            for image, text, score in zip(
                images.numpy(), texts.numpy(), scores.tolist(), strict=True
            )
        ]
