"""Zero-shot classification: class names as prompts, images to the nearest class (CLIP, sec. 3.1).

Letters: I images, C classes, T templates, D embedding width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.evals.bootstrap import mean_of_means
from pipeline.evals.labelled_images import prompt
from pipeline.evals.labelled_parquet import labelled
from pipeline.evals.labelled_part import Labelled, LabelledPart
from pipeline.evals.ranking import ranks, recall
from pipeline.evals.task import Embedder, in_shares


class ZeroShot:
    """Accuracy on a labelled set, each class the mean of its prompts (CLIP, sec. 3.1.4).

    data: directory in CLIP_benchmark's WebDataset layout (labelled_images.py), `split` one of its
        folders, or in Hugging Face's Parquet layout (labelled_parquet.py). An image that cannot be
        read raises ValueError: numbers over part of a set compare with nothing.
    classes: names, or a file with one a line: the other classes and their images take no part.
    templates: a file with one prompt a line, "{c}" for the class name; null: the set's own.
    batch_size: images or prompts per forward; the numbers do not depend on it.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        classes: Sequence[str] | str | None = None,
        templates: str | None = None,
        batch_size: int = 256,
    ) -> None:
        images = labelled(Path(data), split)
        if classes is not None or templates is not None:
            images = LabelledPart(images, classes, templates)
        self.images = images
        self.batch_size = batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """`classification_metrics` of the split."""
        return classification_metrics(*self.scores(trained))

    def scores(self, trained: Embedder) -> tuple[Tensor, Tensor]:
        """`class_scores` of the split's images and the classes."""
        return class_scores(trained, self.images, self.class_embed(trained), self.batch_size)

    def class_embed(self, trained: Embedder) -> Tensor:
        """(C, D): the centre of the T prompts' embeddings; on the sphere their mean, normalised."""
        templates = self.images.templates()
        classes = []
        for names in in_shares(self.images.class_names(), self.batch_size):
            prompts = [prompt(template, name) for name in names for template in templates]
            text_embed = trained.text_embed(prompts, batch_size=self.batch_size)
            classes.append(trained.centre(text_embed.unflatten(0, (len(names), len(templates)))))
        return torch.cat(classes)


def class_scores(
    trained: Embedder, images: Labelled, class_embed: Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """(I, C) similarities of a set's images to the (C, D) classes, and the (I,) int64 labels.

    Raises ValueError for a set without images.
    """
    scores, labels = [], []
    for batch in in_shares(images.samples(), batch_size):
        image_embed = trained.image_embed([image for image, _ in batch], batch_size=batch_size)
        scores.append(trained.similarity(image_embed, class_embed))
        labels += [label for _, label in batch]
    if not labels:
        raise ValueError(f"{images.directory}: no images in split {images.split}")
    return torch.cat(scores), torch.tensor(labels)


def classification_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5, mean_per_class_recall: fractions in [0, 1]. Ties count against the model.

    scores: (I, C), larger is better.  labels: (I,) int64 in [0, C). The mean over classes is over
    those that have an image.
    """
    relevant = one_hot(labels, scores.shape[1]).bool()
    place = ranks(scores, relevant)
    accuracy = recall(place, at=(1, 5))
    return {
        "top1": accuracy[1],
        "top5": accuracy[5],
        "mean_per_class_recall": mean_of_means(place == 0, labels),
    }
