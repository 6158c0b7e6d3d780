"""The geometry card: numbers of the two clouds of embeddings on a fixed held-out set.

They say how an embedding space is shaped, not how good a model is: no number here may choose
between models. Letters: N pairs, D embedding width.
"""

from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pipeline.distributed import rank
from pipeline.evals.geometry.cka import cka
from pipeline.evals.geometry.gap import (
    alignment,
    conformity,
    conformity_of_mean,
    cross_uniformity,
    effective_rank,
    linear_separability,
    modality_gap,
    uniformity,
)
from pipeline.evals.geometry.mixed import without_gap
from pipeline.evals.geometry.schur import schur_complement, spectral_entropy
from pipeline.evals.geometry.whitening import Whitening
from pipeline.evals.retrieval import Retrieval
from pipeline.evals.task import Projector, in_shares
from pipeline.shards import write_atomically


class Geometry:
    """data, split: pairs held out from training, as `Retrieval`'s.  max_pairs: the first so many;
    time and memory grow with its square: 2,000 take two seconds.
    other: a file that an earlier evaluation left with `out`: CKA with that checkpoint. The same
        name as `out` compares each evaluation of a run with the one before.
    out: a safetensors file of the embeddings, and of mean and whitening matrix by modality.
        "beside": STEP.geometry.safetensors beside the checkpoint STEP.ckpt, and gone with it.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        max_pairs: int = 2000,
        other: str | None = None,
        out: str | None = None,
        batch_size: int = 256,
    ) -> None:
        if max_pairs < 4:
            raise ValueError(f"max_pairs={max_pairs}: at least 4")
        self.pairs = Retrieval(data=data, split=split, batch_size=batch_size)
        self.max_pairs, self.other, self.out = max_pairs, other, out
        self.batch_size = batch_size

    def run(self, trained: Projector) -> dict[str, float]:
        """`geometry_metrics` of the pairs, and image_cka, text_cka with `other`."""
        images, texts = self._projected(trained)
        found, kept = geometry_metrics(images, texts)
        first = self.other == self.out and not Path(self.other or "").exists()
        if self.other is not None and not first:
            found |= against(Path(self.other), kept)
        out = self._out(trained)
        if out is not None and rank() == 0:
            write_atomically(out, safetensors.torch.save(kept))
        return found

    def _out(self, trained: Projector) -> Path | None:
        if self.out != "beside":
            return Path(self.out) if self.out is not None else None
        if trained.checkpoint is None:
            return None  # a model of no file
        return trained.checkpoint.with_suffix(".geometry.safetensors")

    def _projected(self, trained: Projector) -> tuple[Tensor, Tensor]:
        images, texts = [], []
        for batch in in_shares(islice(self.pairs.pairs(), self.max_pairs), self.batch_size):
            size = self.batch_size
            images.append(trained.image_projected([i for i, _ in batch], batch_size=size))
            texts.append(trained.text_projected([c for _, c in batch], batch_size=size))
        count = sum(map(len, images))
        if count < 4:
            raise ValueError(f"{self.pairs.data}: {count} pairs, the card needs 4")
        return torch.cat(images), torch.cat(texts)


def geometry_metrics(images: Tensor, texts: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The card, and the tensors that belong beside a checkpoint.

    images, texts: (N, D) projected features before their norm is made 1, row by row a pair.
    """
    image, text = (torch.nn.functional.normalize(x.double(), dim=1) for x in (images, texts))
    left, _ = schur_complement(image, text)
    whole = image.T @ image / len(image)
    found = {
        "gap": modality_gap(image, text),
        "alignment": alignment(image, text),
        "cross_uniformity": cross_uniformity(image, text),
        "linear_separability": linear_separability(image, text),
        "image_text_cka": cka(image, text),
        "image_entropy": spectral_entropy(whole),
        "image_entropy_given_text": spectral_entropy(left),
        "image_variance_given_text": float(left.trace()),
        # what is left of the alignment's distance when both means are taken away
        "alignment_without_gap": alignment(
            without_gap(image, image.mean(0)), without_gap(text, text.mean(0))
        ),
    }
    kept = {"image_embed": image.float(), "text_embed": text.float()}
    for name, unit, raw in (("image", image, images), ("text", text, texts)):
        found |= _of_one(name, unit)
        whitening = Whitening.of(raw)
        likelihood = whitening.log_likelihood(raw)
        found |= {
            f"{name}_log_likelihood": float(likelihood.mean()),
            f"{name}_log_likelihood_spread": float(likelihood.std()),
            f"{name}_whitening_shrinkage": whitening.shrinkage,
        }
        kept |= {f"{name}_mean": whitening.mean, f"{name}_whitening": whitening.matrix}
    return found, {key: tensor.contiguous() for key, tensor in kept.items()}


def _of_one(name: str, unit: Tensor) -> dict[str, float]:
    exact = conformity(unit)
    return {
        f"{name}_uniformity": uniformity(unit),
        f"{name}_effective_rank": effective_rank(unit),
        f"{name}_conformity": float(exact.mean()),
        f"{name}_conformity_spread": float(exact.std()),
        f"{name}_conformity_of_mean": float(conformity_of_mean(unit).mean()),
    }


def against(file: Path, kept: dict[str, Tensor]) -> dict[str, float]:
    """CKA of both modalities with the embeddings that another checkpoint left."""
    try:
        theirs = safetensors.torch.load_file(file)
        before = {name: theirs[f"{name}_embed"] for name in ("image", "text")}
    except Exception as error:  # the library has errors of its own
        raise ValueError(f"other={file}: not left by eval.geometry.out ({error})") from error
    if len(before["image"]) != len(kept["image_embed"]):
        raise ValueError(
            f"other={file} is of {len(before['image'])} pairs, here are {len(kept['image_embed'])}"
        )
    return {f"{name}_cka": cka(kept[f"{name}_embed"], before[name]) for name in before}
