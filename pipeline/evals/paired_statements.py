"""Two pictures that look alike to a model, two statements that tell them apart (MMVP-VLM,
arXiv:2401.06209, sec. 3).

Letters: P pairs of pictures.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.evals.bootstrap import mean
from pipeline.evals.task import Embedder, in_batches

FILE = "statements.jsonl"


class Pair(NamedTuple):
    """Two pictures, and what is true of each alone."""

    images: tuple[bytes, bytes]
    statements: tuple[str, str]
    pattern: str


class PairedStatements:
    """data: a folder with statements.jsonl, a line a pair: {"images": [A, B], "statements": [of A,
    of B], "pattern": P}, the pictures' names being relative to it.
    prompt: the statement in its place of {s}; the benchmark's is "a photo of {s}".

    accuracy: share of pairs whose both pictures get their own statement (`pair_accuracy`), chance a
    quarter; the same for each pattern, under its name.
    """

    def __init__(self, *, data: str, prompt: str = "a photo of {s}", batch_size: int = 256) -> None:
        if "{s}" not in prompt:
            raise ValueError(f"prompt={prompt!r}: no {{s}} for the statement")
        self.data, self.prompt, self.batch_size = Path(data), prompt, batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """accuracy, and {pattern}_accuracy where there are patterns."""
        hits, patterns = [], []
        for batch in in_batches(self.pairs(), self.batch_size):
            images = [image for pair in batch for image in pair.images]
            texts = [self.prompt.replace("{s}", s) for pair in batch for s in pair.statements]
            image_embed, text_embed = (
                embed.unflatten(0, (-1, 2))
                for embed in (
                    trained.image_embed(images, batch_size=self.batch_size),
                    trained.text_embed(texts, batch_size=self.batch_size),
                )
            )
            hits.append(pair_accuracy(trained.similarity(image_embed, text_embed)))
            patterns += [pair.pattern for pair in batch]
        if not hits:
            raise ValueError(f"{self.data / FILE}: no pairs")
        right, rows = torch.cat(hits), defaultdict(list)
        for row, pattern in enumerate(patterns):
            rows[pattern].append(row)
        named = {p: mean(right[where]) for p, where in sorted(rows.items()) if p}
        return {"accuracy": mean(right), **{f"{p}_accuracy": value for p, value in named.items()}}

    def pairs(self) -> Iterator[Pair]:
        """The pairs of the file. Raises ValueError, with the line, for one that does not fit."""
        path = self.data / FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: a line a pair of pictures and statements")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                first, second = (self._picture(name) for name in row["images"])
                one, other = map(str, row["statements"])
            except (ValueError, KeyError, TypeError, OSError) as error:
                kind = type(error).__name__
                raise ValueError(f"{path}, line {number}: {kind}: {error}") from error
            yield Pair((first, second), (one, other), str(row.get("pattern") or ""))

    def _picture(self, name: str) -> bytes:
        path = self.data / name
        if not path.resolve().is_relative_to(self.data.resolve()):
            raise ValueError(f"{name} is outside of {self.data}")
        return path.read_bytes()


def pair_accuracy(similarity: Tensor) -> Tensor:
    """(P,) bool: both images go to their own statement (MMVP's benchmark; chance is a quarter).

    similarity: (P, 2, 2), images by statements. Each statement is given to one of the two images,
    by a softmax over the images; a tie is a miss.
    """
    own, cross = similarity.diagonal(dim1=1, dim2=2), similarity.flip(1).diagonal(dim1=1, dim2=2)
    return (own > cross).all(dim=1)
