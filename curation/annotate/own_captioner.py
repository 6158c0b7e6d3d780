"""Captions by our own small captioner: no download, a forward or two of a small decoder a token.

Train one on a pool: `python -m pipeline.train_captioner data.shards=DIR run=runs/PROXY name=N`.
What it is worth: benchmarks/results/captioner.md. It repeats its pool's words; use it where the
pool's own captions are missing or wrong, and to try a mix before paying for a large model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from curation.annotate.bank import Bank, Candidate, bank_columns, text_hash
from curation.annotate.gates import Gates
from curation.pool import file_digest
from curation.step import uniform
from pipeline.data.images import BadImage, decode
from pipeline.evals.trained import newest_checkpoint
from pipeline.evals.trained_captioner import TrainedCaptioner, captioner_config
from pipeline.models.decoding import check_sampling


class OwnCaptioner:
    """run: a run directory of pipeline.train_captioner; its newest checkpoint is used, and named by
    its content.

    copies: captions of an image, which differ if temperature > 0. guidance: 1 plain, above it more
    of this image and less of the language. gates: None for the defaults, with captions of one word
    allowed. Drawn captions are a function of (seed, uid). Columns: captions_<bank> (role short;
    score: mean log-probability of its tokens), <bank>_refused. threads: in each worker process.
    allow_foreign_targets: whether the run's config may name classes that are not ours.
    """

    version = 1
    needs_images, reads = True, ("caption",)
    operational = ("batch_size", "threads", "allow_foreign_targets")

    def __init__(
        self,
        *,
        run: str,
        bank: str = "own",
        gates: Gates | None = None,
        copies: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        guidance: float = 1.0,
        seed: int = 0,
        batch_size: int = 128,
        threads: int = 1,
        allow_foreign_targets: bool = False,
    ):
        check_sampling(temperature=temperature, top_p=top_p, guidance=guidance)
        if copies < 1 or batch_size < 1 or threads < 1:
            raise ValueError(
                f"copies={copies}, batch_size={batch_size}, threads={threads}: all at least 1"
            )
        captioner_config(run, allow_foreign_targets=allow_foreign_targets)
        self.allow_foreign_targets = allow_foreign_targets
        self.name, self.run, self.copies = f"own_captioner_{bank}", run, copies
        self.gates = gates or Gates(min_words=1, unchanged=False)
        self.temperature, self.top_p, self.guidance = temperature, top_p, guidance
        self.seed, self.batch_size, self.threads = seed, batch_size, threads
        self.checkpoint = str(newest_checkpoint(run))
        self.inputs = {"run": self.checkpoint}
        self.columns: dict[str, pa.DataType] = bank_columns(bank)
        sampling = {"temperature": temperature, "top_p": top_p, "guidance": guidance, "seed": seed}
        self.bank = bank
        self.sampling = sampling
        self._loaded: tuple[TrainedCaptioner, Bank] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}  # each worker loads its own

    def load(self) -> tuple[TrainedCaptioner, Bank]:
        """The model and the bank, once."""
        if self._loaded is None:
            torch.set_num_threads(self.threads)
            model = TrainedCaptioner.load(
                self.run,
                checkpoint=self.checkpoint,
                allow_foreign_targets=self.allow_foreign_targets,
            )
            name = text_hash(file_digest(self.checkpoint))
            bank = Bank(name=self.bank, source="own_captioner", model=name, sampling=self.sampling)
            self._loaded = model, bank
        return self._loaded

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The bank's columns of each sample; an image that cannot be decoded is a reason."""
        bank = self.load()[1]
        bad = [reason_of(sample["image"]) for sample in batch]
        good = [n for n, reason in enumerate(bad) if reason is None]
        found: list[list[Candidate]] = [
            [Candidate("short", None, reason=reason)] if reason else [] for reason in bad
        ]
        for start in range(0, len(good), self.batch_size):
            rows = good[start : start + self.batch_size]
            for row, candidates in zip(rows, self._caption([batch[n] for n in rows]), strict=True):
                found[row] = candidates
        return [bank.row(candidates) for candidates in found]

    def _caption(self, samples: Sequence[dict[str, Any]]) -> list[list[Candidate]]:
        model, _ = self.load()
        pixels = model.pixels([sample["image"] for sample in samples])
        uids = [sample["uid"] for sample in samples]
        found: list[list[Candidate]] = [[] for _ in samples]
        for copy in range(self.copies):
            texts, scores = model.caption(
                pixels,
                uniforms=self.uniforms(uids, copy, model.tokenizer.context_length),
                temperature=self.temperature,
                top_p=self.top_p,
                guidance=self.guidance,
            )
            for row, (text, score) in enumerate(zip(texts, scores, strict=True)):
                reason = self.gates.reason(text, original=samples[row].get("caption") or "")
                found[row].append(Candidate("short", text, score, reason))
        return found

    def uniforms(self, uids: Sequence[str], copy: int, length: int) -> torch.Tensor:
        """(B, L) draws, a function of (seed, uid, copy) alone."""
        draws = [
            uniform(self.seed, self.name, uids, [copy * length + place] * len(uids))
            for place in range(length)
        ]
        return torch.from_numpy(np.stack(draws, axis=1))


def reason_of(image: bytes) -> str | None:
    """Why this image cannot be captioned."""
    try:
        decode(image)
    except BadImage as error:
        return f"image_{error.reason}"
    return None
