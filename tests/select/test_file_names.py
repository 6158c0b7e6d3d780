"""Captions that are file names go, everything that only resembles one stays."""

import pyarrow as pa
import pytest

from curation.select.file_names import FileNames, is_file_name

NAMES = ["3fd1a8b2e75ed8d8.webp", " a/b/Cat.JPG ", "DSC_0042", "img 20231107", "IMG-0001.png"]
CAPTIONS = [
    "a photo of a dog.",
    "Photo 51",
    "how to open a .png file",
    "see cat.jpg for more",
    "image of the day",
    "P 40 fighter",
    "png",
    "",
]


@pytest.mark.parametrize("caption", NAMES)
def test_file_names(caption):
    assert is_file_name(caption)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions(caption):
    assert not is_file_name(caption)


def test_the_reason_is_counted():
    part = pa.table({"uid": ["a", "b"], "caption": [NAMES[0], CAPTIONS[0]]})
    assert FileNames().apply(part, None, 0).to_pylist() == ["file_name", None]
