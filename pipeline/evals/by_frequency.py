"""Zero-shot accuracy by how often a class is mentioned in the training captions: tail, middle and
head (few-, medium- and many-shot classes in Liu et al., arXiv:1904.05160).

Balancing is meant to help the tail (MetaCLIP, arXiv:2309.16671); one accuracy over all classes
cannot show that. The counts come from one set of captions whatever the model was trained on, so
that the groups are the same classes in each arm of a comparison.
Letters: I images, C classes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.evals.ranking import ranks
from pipeline.evals.task import Embedder
from pipeline.evals.zero_shot import ZeroShot
from pipeline.shards import read_manifest

WORD = re.compile(r"\w+")
GROUPS = ("tail", "middle", "head")


class ByFrequency:
    """Accuracy of head, middle and tail classes, and how accuracy goes with frequency.

    data, split, batch_size: as in ZeroShot, whose scores these are.
    counts: where the number of mentions of each class comes from: a shards directory of ours (the
        captions of its index: take the raw pool's), or a JSON object {class name: count}.
    Price: one pass over the captions, about 80,000 a second; for more than some millions write
        the JSON once.
    """

    def __init__(
        self, *, data: str, counts: str, split: str = "test", batch_size: int = 256
    ) -> None:
        self.zero_shot = ZeroShot(data=data, split=split, batch_size=batch_size)
        self.counts = Path(counts)

    def run(self, trained: Embedder) -> dict[str, float]:
        """`frequency_metrics` of the split."""
        names = self.zero_shot.images.class_names()
        counts = class_counts(self.counts, names)
        scores, labels = self.zero_shot.scores(trained)
        places = ranks(scores, one_hot(labels, len(names)).bool())
        return frequency_metrics(places, labels, torch.tensor(counts))


def class_counts(source: Path, names: Sequence[str]) -> list[int]:
    """How often each class is mentioned: `mentions` in a dataset's captions, or a JSON's numbers.

    Raises ValueError for a JSON that is no object of numbers or lacks a class.
    """
    if source.suffix != ".json":
        return mentions(names, captions(source))
    content = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else None
    if not isinstance(content, dict):
        raise ValueError(
            f"counts={source}: need a shards directory, or a JSON file {{class name: count}}"
        )
    missing = [name for name in names if not isinstance(content.get(name), int)]
    if missing:
        raise ValueError(f"{source}: no whole number for {len(missing)} classes, as {missing[:5]}")
    return [content[name] for name in names]


def captions(directory: Path) -> Iterable[str]:
    """The primary caption of every record of a dataset, from its index alone."""
    for shard in read_manifest(directory)["shards"]:
        index = pq.read_table(directory / f"{shard['name']}.parquet", columns=["caption"])
        yield from index["caption"].to_pylist()


def mentions(names: Sequence[str], captions: Iterable[str]) -> list[int]:
    """Number of captions that hold each name: its words one after the other, whole, case-folded.

    A name without any word (an emoticon) is mentioned nowhere.
    """
    wanted = [tuple(WORD.findall(name.casefold())) for name in names]
    lengths, known = sorted({len(words) for words in wanted} - {0}), set(wanted)
    counts: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        words = WORD.findall(caption.casefold())
        runs = {
            tuple(words[start : start + length])
            for length in lengths
            for start in range(len(words) - length + 1)
        }
        counts.update(runs & known)
    return [counts[words] for words in wanted]


def frequency_metrics(places: Tensor, labels: Tensor, counts: Tensor) -> dict[str, float]:
    """Accuracies in [0, 1] by group, the groups' bounds, and Spearman's rank correlations.

    places: (I,) int64, wrong classes before the right one (`ranks`).  labels: (I,) int64 in [0, C).
    counts: (C,) int64, mentions of each class. Classes without an image take no part.
    {tail,middle,head}_top1, _top5: mean over the group's classes of their accuracy.
    {tail,middle,head}_percentile: mean over its classes of 1 - place / (C - 1): 1 is always first,
        0.5 is chance; moves where hits at 5 are too rare to count.
    tail_max_count, head_min_count: the groups are cut at the thirds of the sorted counts, equal
        counts together, so their sizes ({group}_classes) differ where many classes share a count.
    correlation_top5, correlation_percentile: over classes, of count and accuracy, in [-1, 1]; 0
        where one of them does not vary.
    Raises ValueError if the counts do not differ enough for three groups.
    """
    classes = labels.unique()
    percentile = 1 - places.double() / max(len(counts) - 1, 1)
    values = {
        "top1": (places < 1).double(),
        "top5": (places < 5).double(),
        "percentile": percentile,
    }
    by_class = {
        name: torch.stack([value[labels == label].mean() for label in classes])
        for name, value in values.items()
    }
    count = counts[classes]
    lower, upper = thirds(count)
    groups = {"tail": count <= lower, "head": count > upper}
    groups["middle"] = ~groups["tail"] & ~groups["head"]
    if not all(bool(members.any()) for members in groups.values()):
        raise ValueError(
            f"counts of {len(count)} classes cannot be cut in three: a third have at most {lower} "
            f"mentions, two thirds at most {upper}, all at most {int(count.max())}"
        )
    found: dict[str, float] = {}
    for group in GROUPS:
        members = groups[group]
        found |= {f"{group}_{name}": float(by_class[name][members].mean()) for name in by_class}
        found[f"{group}_classes"] = float(members.sum())
    return found | {
        "tail_max_count": float(lower),
        "head_min_count": float(count[groups["head"]].min()),
        "correlation_top5": rank_correlation(count, by_class["top5"]),
        "correlation_percentile": rank_correlation(count, by_class["percentile"]),
    }


def thirds(count: Tensor) -> tuple[int, int]:
    """The counts of the last class of the first and of the second third, in ascending order."""
    ascending = count.sort().values
    return tuple(int(ascending[-(-len(ascending) * part // 3) - 1]) for part in (1, 2))


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing their mean rank."""
    ranked = [_mean_ranks(values) for values in (first, second)]
    centred = [values - values.mean() for values in ranked]
    norms = [float(values.norm()) for values in centred]
    return float(centred[0] @ centred[1]) / (norms[0] * norms[1]) if all(norms) else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    # means of the same numbers in another order differ in the last bit, and are equal all the same
    values = values.double().round(decimals=9)
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    return (last - (sizes - 1) / 2)[group]
