"""Drop captions that are the name of a file: they say nothing of the picture.

Web pools are full of them, since many pages put the file name where the description belongs; rules
on length and language let them pass ("webp" even becomes an entry of a pool's own word list).
Price: one regular expression a caption.
"""

import re
from typing import Any

import pyarrow as pa

# one word with the extension of a picture, or a camera's counter with or without one
FILE_NAME = re.compile(
    r"(?:\S+\.(?:avif|bmp|gif|heic|jpe?g|png|svg|tiff?|webp)"
    r"|(?:img|image|dsc[fn]?|pict?|p|photo|screenshot)[ _-]*\d{3,}\S*)",
    re.IGNORECASE,
)


def is_file_name(caption: str) -> bool:
    """Whether the whole caption is a file's name, such as "3fd1a8b2.webp" or "DSC_0042"."""
    return FILE_NAME.fullmatch(caption.strip()) is not None


class FileNames:
    """No knobs. Reason: file_name."""

    name, version = "file_names", 1
    reads = ("caption",)

    def measure(self, part: pa.Table) -> None:
        """Each caption is judged alone."""

    def combine(self, measures: list[Any]) -> None:
        """Nothing to combine."""

    def apply(self, part: pa.Table, combined: None, seed: int) -> pa.Array:
        """file_name, or null."""
        captions = part["caption"].to_pylist()
        return pa.array(["file_name" if is_file_name(c) else None for c in captions], pa.string())
