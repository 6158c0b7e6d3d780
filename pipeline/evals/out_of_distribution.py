"""Whether images of unknown classes can be told from those of known ones.

Letters: I images of known classes, O of unknown ones, C known classes.
"""

from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from pipeline.evals.labelled_parquet import labelled
from pipeline.evals.labelled_part import Labelled
from pipeline.evals.task import Embedder
from pipeline.evals.zero_shot import ZeroShot, class_scores


class OutOfDistribution:
    """AUROC and FPR95 of two scores: the largest softmax probability (MCM, arXiv:2211.13445), and
    the largest cosine (of another metric: the largest similarity).

    data, split, templates: as `ZeroShot`'s: the known classes.
    outside, outside_split: a labelled set of other classes; null: `held_out` of the classes of
        `data` are taken for unknown, which ones being a function of their names and the seed.
    temperature: the softmax is of cosine / temperature; null: 1 / logit_scale. MCM uses 1.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        outside: str | None = None,
        outside_split: str = "test",
        held_out: float = 0.5,
        templates: str | None = None,
        temperature: float | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature={temperature}: above 0, or null")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out}: a fraction in (0, 1)")
        names, unknown = None, []
        if outside is None:
            names, unknown = parted(labelled(Path(data), split), held_out, seed)
            outside, outside_split = data, split
        self.known = ZeroShot(
            data=data, split=split, classes=names, templates=templates, batch_size=batch_size
        )
        self.unknown = ZeroShot(
            data=outside, split=outside_split, classes=unknown or None, batch_size=batch_size
        )
        self.temperature, self.batch_size = temperature, batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """{mcm,cosine}_{auroc,fpr95}, and the number of images of each kind."""
        class_embed = self.known.class_embed(trained)
        inside, outside = (
            class_scores(trained, part.images, class_embed, self.batch_size)[0]
            for part in (self.known, self.unknown)
        )
        scale = trained.logit_scale if self.temperature is None else 1 / self.temperature
        found = {"known_images": float(len(inside)), "unknown_images": float(len(outside))}
        for name, score in (
            ("mcm", lambda cosine: (cosine.double() * scale).softmax(dim=1).amax(dim=1)),
            ("cosine", lambda cosine: cosine.double().amax(dim=1)),
        ):
            known, unknown = score(inside), score(outside)
            found |= {
                f"{name}_auroc": auroc(known, unknown),
                f"{name}_fpr95": fpr95(known, unknown),
            }
        return found


def parted(images: Labelled, held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """(known, unknown) class names: the share `held_out` with the smallest hashes is unknown."""
    names = images.class_names()
    unique = [name for name in names if names.count(name) == 1]
    ordered = sorted(
        unique, key=lambda name: blake2b(name.encode(), key=str(seed).encode()).digest()
    )
    cut = round(held_out * len(ordered))
    if not 0 < cut < len(ordered) - 1:
        raise ValueError(
            f"held_out={held_out} of {len(ordered)} classes leaves {len(ordered) - cut} known and "
            f"{cut} unknown: need two known and one unknown"
        )
    unknown = set(ordered[:cut])
    return [n for n in unique if n not in unknown], [n for n in unique if n in unknown]


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Probability that a known image scores above an unknown one; a tie counts half."""
    _, group, sizes = torch.cat([known, unknown]).unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    places = (last - (sizes - 1) / 2)[group[: len(known)]]  # 1-based, ties share their mean
    wins = places.sum() - len(known) * (len(known) + 1) / 2
    return float(wins / (len(known) * len(unknown)))


def fpr95(known: Tensor, unknown: Tensor) -> float:
    """Share of unknown images that pass the highest threshold that 95 % of the known pass."""
    descending = known.sort(descending=True).values
    threshold = descending[-(-95 * len(known) // 100) - 1]  # ceil without a rounded product
    return float((unknown >= threshold).double().mean())
