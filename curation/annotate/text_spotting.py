"""Annotator: the text that can be read in the image (OCR), for the parrot filter
(arXiv:2312.14232).

Facts of the image alone: what a caption has to do with them is the parrot selector's business, so
that another rule costs seconds and no OCR.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.annotate.rapidocr import RapidOcr
from curation.annotate.text_spotter import EngineUnavailable, Region, TextSpotter
from pipeline.data.images import BadImage, decode

_REGION = pa.struct(
    [
        ("text", pa.string()),
        ("confidence", pa.float32()),
        ("area_fraction", pa.float32()),
        ("x0", pa.float32()),  # the box around the polygon, as fractions of width and height
        ("y0", pa.float32()),
        ("x1", pa.float32()),
        ("y1", pa.float32()),
    ]
)
_GRID = 256  # points a side at which covered area is sampled
_FAILURES = 16  # fewer in a batch are bad luck, however small the batch


class TextSpotting:
    """Spotted regions in reading order (words, with the default engine), and `text_area_fraction`,
    the share of the image under them: of their union, sampled at 256 x 256 points, and at least one
    point when anything was read.

    engine: a `TextSpotter`; by default rapidocr-onnxruntime on the CPU.
    min_side: images with a shorter side below are enlarged to it (bicubic) for the engine. On
        64-pixel drawings (25 rendered words, 26 legible ones of the sample pool) 64 finds all; 128
        and more finds none more, misses small print and invents more single letters. On 32-pixel
        drawings 21 of 25 words are found without enlarging and 25 with 64.
    max_side: larger images are reduced to it.
    min_confidence: regions read with less are left out.
    max_failed_fraction: more engine failures in one batch stop the run (16 failures and fewer never
        do): then it is the engine and not the image, and no text found would look like no text.
    Price, a CPU core: 4 ms an image without text at min_side 64, 5 at 96, 7 at 128, 15 at 192, 25
        at 256, 70 at 384 pixels; a line of text costs about 25 ms more, whatever the size.
    An image on which the engine fails gets no regions, a null area and the exception's name in
        `text_spotting_error`.
    """

    name = "text_spotting"
    version = 2
    needs_images = True
    reads = ()
    inputs: ClassVar[dict[str, str]] = {}
    columns: ClassVar[dict[str, pa.DataType]] = {
        "spotted_text": pa.list_(_REGION),
        "text_area_fraction": pa.float32(),
        "text_spotting_error": pa.string(),
    }
    operational = ("engine.provider", "engine.threads", "max_failed_fraction")

    def __init__(
        self,
        *,
        engine: TextSpotter | None = None,
        min_side: int = 64,
        max_side: int = 960,
        min_confidence: float = 0.5,
        max_failed_fraction: float = 0.1,
    ):
        if not 1 <= min_side <= max_side:
            raise ValueError(
                f"min_side {min_side} and max_side {max_side}: need 1 <= min_side <= max_side"
            )
        if not 0.0 <= min_confidence <= 1.0:
            raise ValueError(f"min_confidence {min_confidence} is outside [0, 1]")
        if not 0.0 <= max_failed_fraction <= 1.0:
            raise ValueError(f"max_failed_fraction {max_failed_fraction} is outside [0, 1]")
        self.engine = RapidOcr() if engine is None else engine
        self.min_side = min_side
        self.max_side = max_side
        self.min_confidence = min_confidence
        self.max_failed_fraction = max_failed_fraction

    def scaled(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3) RGB pixels as the engine sees them: sides within [min_side, max_side], the
        upper limit first.
        """
        short, long = min(image.size), max(image.size)
        factor = min(max(1.0, self.min_side / short), self.max_side / long)
        if factor != 1.0:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image)

    def spot(self, image: Image.Image) -> tuple[list[dict[str, Any]], float]:
        """The regions of one RGB image, and the share of it that they cover."""
        pixels = self.scaled(image)
        found = [r for r in self.engine.spot(pixels) if r.confidence >= self.min_confidence]
        size = (pixels.shape[1], pixels.shape[0])
        polygons = [np.clip(np.asarray(r.polygon, np.float64) / size, 0.0, 1.0) for r in found]
        regions = [_row(r, polygon) for r, polygon in zip(found, polygons, strict=True)]
        return regions, covered_fraction(polygons)

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Read every image; one that fails gets no regions and a reason.

        Raises ValueError when the engine fails on too many of them.
        """
        rows = []
        for sample in batch:
            regions, area, problem = [], None, None
            try:
                regions, area = self.spot(decode(sample["image"]))
            except BadImage as error:
                problem = error.reason
            except (EngineUnavailable, ImportError):
                raise  # without an engine the run must stop
            except Exception as error:  # whatever one image does to the engine must not end the run
                problem = f"engine_{type(error).__name__}"
            rows.append(
                {
                    "spotted_text": regions,
                    "text_area_fraction": area,
                    "text_spotting_error": problem,
                }
            )
        self._check([row["text_spotting_error"] for row in rows])
        return rows

    def _check(self, problems: Sequence[str | None]) -> None:
        failed = [p for p in problems if p is not None and p.startswith("engine_")]
        if len(failed) > max(_FAILURES, self.max_failed_fraction * len(problems)):
            raise ValueError(
                f"text_spotting: the engine failed on {len(failed)} of {len(problems)} images "
                f"({', '.join(sorted(set(failed)))}), over max_failed_fraction="
                f"{self.max_failed_fraction}: mend the engine, or raise it if that is right"
            )


def _row(region: Region, polygon: np.ndarray) -> dict[str, Any]:
    """polygon: (corners, 2), as fractions of width and height."""
    (x0, y0), (x1, y1) = polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()
    x, y = polygon.T
    area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    return {
        "text": region.text,
        "confidence": float(region.confidence),
        "area_fraction": area,
        "x0": x0,
        "y0": y0,
        "x1": x1,
        "y1": y1,
    }


def covered_fraction(polygons: Sequence[np.ndarray]) -> float:
    """Share of the unit square under the union of polygons, each (corners, 2) inside it.

    Sampled at the centres of a grid of 256 x 256 cells (a polygon covers what is inside it by the
    even-odd rule), at least one cell if there is a polygon.
    """
    if not polygons:
        return 0.0
    covered = np.zeros((_GRID, _GRID), bool)
    for polygon in polygons:
        corners = polygon * _GRID
        (left, top), (right, bottom) = (
            np.floor(corners.min(axis=0)).astype(int),
            np.ceil(corners.max(axis=0)).astype(int),
        )
        x, y = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
        inside = np.zeros((len(y), len(x)), bool)
        for (xa, ya), (xb, yb) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            crossed = (ya > y) != (yb > y)
            if crossed.any():
                crossing = xa + (y[crossed] - ya) * (xb - xa) / (yb - ya)
                inside[crossed] ^= x < crossing[:, None]
        covered[top:bottom, left:right] |= inside
    return max(1, int(covered.sum())) / _GRID**2
