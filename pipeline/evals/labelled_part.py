"""A part of a labelled set: some of its classes, other prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.evals.labelled_images import lines_of, templates_of


class Labelled(Protocol):
    """A set of images with one class each."""

    directory: Path
    split: str

    def class_names(self) -> list[str]: ...

    def templates(self) -> list[str]: ...

    def samples(self) -> Iterator[tuple[bytes, int]]: ...


class LabelledPart:
    """classes: names, or a file with one a line; None for all. templates: a file; None: the set's.

    Labels are counted among these classes, in the order given. Raises ValueError for a class that
    the set has not, or has under two labels.
    """

    def __init__(
        self, whole: Labelled, classes: Sequence[str] | str | None, templates: str | None
    ) -> None:
        self.whole, self.directory, self.split = whole, whole.directory, whole.split
        self.file = templates
        self.classes = lines_of(Path(classes)) if isinstance(classes, str) else classes

    def class_names(self) -> list[str]:
        """The name of each label."""
        return list(self._old())

    def templates(self) -> list[str]:
        """Prompts with "{c}" for the class name."""
        return self.whole.templates() if self.file is None else templates_of(Path(self.file))

    def samples(self) -> Iterator[tuple[bytes, int]]:
        """(image bytes, label) of the images of these classes."""
        new = {old: label for label, old in enumerate(self._old().values())}
        for image, label in self.whole.samples():
            if label in new:
                yield image, new[label]

    def _old(self) -> dict[str, int]:
        names = self.whole.class_names()
        chosen = names if self.classes is None else list(self.classes)
        unclear = [name for name in chosen if names.count(name) != 1 or chosen.count(name) != 1]
        if unclear or not chosen:
            raise ValueError(
                f"classes: {unclear[:5]} of {len(chosen)} are not there, or not once, among the "
                f"{len(names)} of {self.directory}, as {names[:5]}"
            )
        return {name: names.index(name) for name in chosen}
