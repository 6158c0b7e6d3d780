"""Image-text retrieval: which caption belongs to an image, which image to a caption.

Letters: I distinct images, T distinct captions, P pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.evals.labelled_images import CLASS_NAMES, LabelledImages, prompt
from pipeline.evals.ranking import ranks, recall
from pipeline.evals.task import Embedder
from pipeline.shards import Record, records

CHUNK = 1024  # queries scored at once: similarity to 100,000 candidates is 0.4 GiB


class Retrieval:
    """Recall at 1, 5 and 10 in both directions.

    data: a shards directory of ours, or a set in CLIP_benchmark's layout: a retrieval set (KEY.txt
        has one caption a line), or a labelled one (the class name in the first template).
    captions: of our shards, the "primary" one of each record, or "all".
    max_pairs: only the first so many pairs; recall falls with the number of candidates, so numbers
        over different numbers of pairs do not compare.
    The same image bytes, or the same caption, in several pairs is one item with several right
    answers, and finding any of them is a hit.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        captions: Literal["primary", "all"] = "primary",
        max_pairs: int | None = None,
        batch_size: int = 256,
    ) -> None:
        if captions not in ("primary", "all"):
            raise ValueError(f"captions={captions!r}: 'primary' or 'all'")
        self.captions = captions
        self.data = Path(data)
        self.split = split
        self.max_pairs = max_pairs
        self.batch_size = batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """`retrieval_metrics` of the pairs, without the whole similarity matrix in memory."""
        images, captions, pairs = distinct(islice(self.pairs(), self.max_pairs))
        if not len(pairs):
            raise ValueError(f"{self.data}: no pairs to retrieve")
        image_embed = trained.image_embed(images, batch_size=self.batch_size)
        text_embed = trained.text_embed(captions, batch_size=self.batch_size)
        return _recalls(
            places_of(image_embed, text_embed, pairs, trained.similarity),
            places_of(text_embed, image_embed, pairs.flip(1), trained.similarity),
            (1, 5, 10),
        )

    def pairs(self) -> Iterator[tuple[bytes, str]]:
        """(image bytes, caption)."""
        if (self.data / "manifest.json").exists():
            for record in records(self.data):
                for caption in self._captions_of(record):
                    yield record.image, caption
            return
        labelled = LabelledImages(self.data, self.split)
        if not (self.data / CLASS_NAMES).exists():
            for image, captions in labelled.captioned():
                for caption in captions:
                    yield image, caption
            return
        template = labelled.templates()[0]
        captions = [prompt(template, name) for name in labelled.class_names()]
        for image, label in labelled.samples():
            yield image, captions[label]

    def _captions_of(self, record: Record) -> list[str]:
        if self.captions == "primary":
            return [record.caption]
        others = [entry["text"] for entry in record.info.get("captions", []) if entry.get("text")]
        return list(dict.fromkeys([record.caption, *others]))


def distinct(pairs: Iterable[tuple[bytes, str]]) -> tuple[list[bytes], list[str], Tensor]:
    """Distinct images, distinct captions, and the pairs as (P, 2) int64 indices into them."""
    images: dict[bytes, int] = {}
    captions: dict[str, int] = {}
    indices = [
        (images.setdefault(image, len(images)), captions.setdefault(caption, len(captions)))
        for image, caption in pairs
    ]
    return list(images), list(captions), torch.tensor(indices, dtype=torch.int64).reshape(-1, 2)


def places_of(
    queries: Tensor,
    candidates: Tensor,
    pairs: Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`ranks` of every query among all candidates, a chunk of queries at a time.

    pairs: (P, 2) int64, a query and a candidate that is right for it.
    """
    places = []
    for start in range(0, len(queries), CHUNK):
        scores = similarity(queries[start : start + CHUNK], candidates)
        places.append(ranks(scores, _relevant(pairs, scores.shape, start)))
    return torch.cat(places)


def retrieval_metrics(
    similarity: Tensor, pairs: Tensor, *, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """image_to_text_r_at_k and text_to_image_r_at_k in [0, 1]. Ties count against the model.

    similarity: (I, T).  pairs: (P, 2) int64, an image and a caption that belong together; every
    image and every caption is in at least one.
    """
    image_places = ranks(similarity, _relevant(pairs, similarity.shape, 0))
    text_places = ranks(similarity.T, _relevant(pairs.flip(1), similarity.T.shape, 0))
    return _recalls(image_places, text_places, at)


def _recalls(image_places: Tensor, text_places: Tensor, at: Sequence[int]) -> dict[str, float]:
    directions = {"image_to_text": image_places, "text_to_image": text_places}
    return {
        f"{direction}_r_at_{k}": value
        for direction, places in directions.items()
        for k, value in recall(places, at=at).items()
    }


def _relevant(pairs: Tensor, shape: torch.Size, start: int) -> Tensor:
    """(rows, candidates) bool of the queries start, start + 1, ..."""
    relevant = torch.zeros(shape, dtype=torch.bool)
    here = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + shape[0])]
    relevant[here[:, 0] - start, here[:, 1]] = True
    return relevant
