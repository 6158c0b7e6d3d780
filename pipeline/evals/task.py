"""What an evaluation task needs, and what it is: trained model -> named numbers.

Dashboard keys are `eval/<task>/<metric>`; the x-axis is samples_seen. A task is a component of
`conf/eval/*.yaml`; its key there is its name.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
# Embedded at a time: up to so many ranks have work. The same for any number of ranks, since the
# size of a matrix product shows in its last bits.
SHARED_BATCHES = 32


class Embedder(Protocol):
    """Bytes and strings to embeddings: (n, D) float32 on the CPU, in the order given, compared by
    the model's own metric alone.
    """

    @property
    def logit_scale(self) -> float: ...

    def similarity(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(..., N, D), (..., M, D) -> (..., N, M), larger is nearer; the cosine, if it is that."""

    def centre(self, embeds: Tensor) -> Tensor:
        """(..., n, D) -> (..., D): one embedding in the place of several, as of prompts."""

    def image_embed(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor: ...

    def text_embed(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor: ...

    def image_features(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor:
        """(n, width): the tower's output, before the projection."""


def similarities(trained: Embedder, first: Tensor, second: Tensor) -> Tensor:
    """(n, D), (n, D) -> (n,): row by row, in float64 where the metric is an inner product."""
    rows = first.double().unsqueeze(1), second.double().unsqueeze(1)
    return trained.similarity(*rows).flatten()


class Projector(Protocol):
    """The same before the norm is made 1.

    checkpoint: the file of the weights, None for a model of no file.
    """

    checkpoint: Path | None

    def image_projected(self, images: Sequence[bytes], *, batch_size: int = 256) -> Tensor: ...

    def text_projected(self, captions: Sequence[str], *, batch_size: int = 256) -> Tensor: ...


class Task(Protocol):
    """One evaluation. Its numbers do not depend on how the samples are batched, or on the number of
    ranks: each runs the whole task, and the embedder shares the forwards out.
    """

    def run(self, trained: Embedder) -> dict[str, float]: ...


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def in_shares(items: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Lists of as many items as the ranks embed together, a batch after the other."""
    return in_batches(items, batch_size * SHARED_BATCHES)


def run_task(name: str, task: Task, trained: Embedder) -> dict[str, float]:
    """The task's numbers under their dashboard keys: {"eval/<name>/<metric>": number}."""
    return {f"eval/{name}/{metric}": value for metric, value in task.run(trained).items()}
