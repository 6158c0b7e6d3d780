"""What a text spotting engine is: the interface behind the text_spotting annotator.

To use another engine (DeepSolo, a server, tesseract ...), write a class with `spot` and name it:
`'~annotate.text_spotting.engine' +annotate.text_spotting.engine._target_=my_package.Engine`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Region:
    """A word, or a line of words if the engine does not tell them apart.

    polygon: three or more corners (x, y) in pixels of the image that was given, in drawing order.
    """

    text: str
    confidence: float  # in [0, 1]
    polygon: tuple[tuple[float, float], ...]


class TextSpotter(Protocol):
    """An engine. Heavy state is loaded by the first `spot` and must not be pickled."""

    def spot(self, image: np.ndarray) -> list[Region]:
        """The regions of one image, (H, W, 3) uint8 RGB, in reading order.

        May raise anything for an image: that image is counted and left out. EngineUnavailable and
        ImportError stop the run instead.
        """
        ...


class EngineUnavailable(ValueError):
    """The engine cannot run here at all, whatever the image."""
