"""A labelled image set in the Parquet layout of Hugging Face's image classification datasets.

<split>*.parquet, in the folder or in its data/: a column of images {bytes, path} and one of labels,
which the schema's metadata call Image and ClassLabel; with ClassLabel come the names. A file
classnames.txt or zeroshot_classification_templates.txt beside them is used in their place, as
CLIP_benchmark's are (labelled_images.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evals.labelled_images import CLASS_NAMES, TEMPLATES, LabelledImages

PROMPTS = ["a photo of a {c}."]  # CLIP sec. 3.1.4
ROWS = 256  # in memory at once


@dataclass(frozen=True)
class LabelledParquet:
    """One split. Raises ValueError, at any use, for a file that is missing or does not fit."""

    directory: Path
    split: str = "test"

    def class_names(self) -> list[str]:
        """The name of each label."""
        if (self.directory / CLASS_NAMES).exists():
            return LabelledImages(self.directory, self.split).class_names()
        names = self._features()[1].get("names")
        if not isinstance(names, list) or not names:
            raise ValueError(
                f"{self._files()[0]}: its labels have no names; write {CLASS_NAMES}, a line a "
                f"class, into {self.directory}"
            )
        return [str(name).replace("_", " ") for name in names]

    def templates(self) -> list[str]:
        """Prompts with "{c}" for the class name."""
        if (self.directory / TEMPLATES).exists():
            return LabelledImages(self.directory, self.split).templates()
        return PROMPTS

    def samples(self) -> Iterator[tuple[bytes, int]]:
        """(image bytes, label), in the order of the files."""
        (image, label), num_classes = self._columns(), len(self.class_names())
        for file in self._files():
            try:
                for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=[image, label]):
                    yield from _rows(batch, file, num_classes)
            except (OSError, pa.ArrowException, KeyError, TypeError) as error:
                raise ValueError(f"{file}: damaged ({error}); copy it again") from error

    def _files(self) -> list[Path]:
        for folder in (self.directory, self.directory / "data"):
            found = sorted(folder.glob(f"{self.split}*.parquet"))
            if found:
                return found
        raise ValueError(f"{self.directory}: no {self.split}*.parquet, there or in data/")

    def _features(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The features of the first file's schema, and the first that is a ClassLabel."""
        file = self._files()[0]
        try:
            metadata = pq.read_schema(file).metadata or {}
            features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
            labels = [v for v in features.values() if v.get("_type") == "ClassLabel"]
        except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError):
            return {}, {}
        return features, labels[0] if labels else {}

    def _columns(self) -> tuple[str, str]:
        """The columns of images and of labels: by their types, else by their names."""
        features, _ = self._features()
        names = pq.read_schema(self._files()[0]).names
        found = []
        for kind, usual in (("Image", "image"), ("ClassLabel", "label")):
            typed = [name for name, value in features.items() if value.get("_type") == kind]
            name = next((name for name in (*typed, usual) if name in names), None)
            if name is None:
                raise ValueError(f"{self._files()[0]}: no column of type {kind} in {names}")
            found.append(name)
        return found[0], found[1]


def _rows(batch: pa.RecordBatch, file: Path, num_classes: int) -> Iterator[tuple[bytes, int]]:
    images, labels = (column.to_pylist() for column in batch.columns)
    for image, label in zip(images, labels, strict=True):
        data = image["bytes"] if isinstance(image, dict) else image
        if not isinstance(data, bytes) or not isinstance(label, int):
            raise ValueError(f"{file}: a row without an image or a label: {str(label)[:40]!r}")
        if not 0 <= label < num_classes:
            raise ValueError(f"{file}: label {label}, and {num_classes} classes have names")
        yield data, label


def labelled(directory: Path, split: str) -> LabelledImages | LabelledParquet:
    """The set in a folder, by what lies in it."""
    found = LabelledParquet(directory, split)
    parquet = any(directory.glob(f"{split}*.parquet")) or any(
        directory.glob(f"data/{split}*.parquet")
    )
    return found if parquet else LabelledImages(directory, split)
