"""A labelled image set in the WebDataset layout that LAION's CLIP_benchmark reads.

classnames.txt                           one class a line; the line number is the label
zeroshot_classification_templates.txt    one prompt a line, "{c}" stands for the class name
<split>/nshards.txt, <split>/0.tar ...   members KEY.webp|jpg|jpeg|png and KEY.cls (the label), or,
                                         in a retrieval set, KEY.txt (a caption a line)
"""

import contextlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
IMAGE_SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class LabelledImages:
    """One split. Raises ValueError, at any use, for a file that is missing or does not fit."""

    directory: Path
    split: str = "test"

    def class_names(self) -> list[str]:
        """The name of each label."""
        return self._lines(CLASS_NAMES)

    def templates(self) -> list[str]:
        """Prompts with "{c}" for the class name."""
        return templates_of(self._existing(TEMPLATES))

    def samples(self) -> Iterator[tuple[bytes, int]]:
        """(image bytes, label), in the order of the shards."""
        num_classes = len(self.class_names())
        for shard in self._shards():
            for key, image, text in _pairs(shard, "cls"):
                label = _number(text, f"{shard}: {key}.cls")
                if not 0 <= label < num_classes:
                    raise ValueError(
                        f"{shard}: {key}.cls is {label}, but {CLASS_NAMES} has {num_classes} lines"
                    )
                yield image, label

    def captioned(self) -> Iterator[tuple[bytes, list[str]]]:
        """(image bytes, its captions) of a retrieval set: KEY.txt has one caption a line."""
        for shard in self._shards():
            for key, image, text in _pairs(shard, "txt"):
                lines = text.decode("utf-8", errors="replace").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
                if not captions:
                    raise ValueError(f"{shard}: {key}.txt has no caption")
                yield image, captions

    def _shards(self) -> Iterator[Path]:
        name = f"{self.split}/nshards.txt"
        for number in range(_number(self._lines(name)[0], f"{self.directory / name}")):
            yield self._existing(f"{self.split}/{number}.tar")

    def _existing(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: `data` must be a directory in CLIP_benchmark's WebDataset "
                f"layout ({CLASS_NAMES}, {TEMPLATES}, {self.split}/nshards.txt, "
                f"{self.split}/0.tar ...)"
            )
        return path

    def _lines(self, name: str) -> list[str]:
        return lines_of(self._existing(name))


def lines_of(path: Path) -> list[str]:
    """The lines that are not blank. Raises ValueError for a file without any."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def templates_of(path: Path) -> list[str]:
    """Prompts, one a line, with "{c}" for the class name."""
    templates = lines_of(path)
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"{path}: no {{c}} in {template!r}")
    return templates


def prompt(template: str, class_name: str) -> str:
    """The class name in its place."""
    return template.replace("{c}", class_name)


def _pairs(shard: Path, suffix_of_text: str) -> Iterator[tuple[str, bytes, bytes]]:
    """(key, image, text) of a tar; the two members of a key may come in either order."""
    waiting: dict[str, dict[str, bytes]] = {}
    with contextlib.closing(_members(shard, suffix_of_text)) as members:
        for key, kind, content in members:
            found = waiting.setdefault(key, {})
            found[kind] = content
            if len(found) == 2:
                yield key, found["image"], found[suffix_of_text]
                del waiting[key]
    if waiting:
        key, found = next(iter(waiting.items()))
        raise ValueError(f"{shard}: {key} has only its {next(iter(found))}, {len(waiting)} such")


def _members(shard: Path, suffix_of_text: str) -> Iterator[tuple[str, str, bytes]]:
    """(key, "image" or the text's suffix, content) of an uncompressed tar, one in memory."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, dot, suffix = member.name.rpartition(".")
                kind = "image" if dot + suffix.lower() in IMAGE_SUFFIXES else suffix
                wanted = member.isfile() and not member.issparse()  # a few bytes that say gigabytes
                if wanted and kind in ("image", suffix_of_text):
                    content = tar.extractfile(member)
                    assert content is not None  # isfile()
                    yield key, kind, content.read()
    except (tarfile.TarError, OSError, OverflowError, MemoryError) as error:
        raise ValueError(f"{shard}: not a whole tar ({error}); copy it again") from error


def _number(text: str | bytes, where: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{where}: {text[:40]!r} is not a whole number") from error
