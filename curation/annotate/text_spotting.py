"""Annotator: the text that can be read in the image (OCR), for the parrot filter
(arXiv:2312.14232).

Engine: rapidocr-onnxruntime (PP-OCRv4 detector and recogniser). It enlarges every image to 736
pixels by default, which is what makes it slow; we run it at the image's own size, only small images
are enlarged.
"""

import math
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.data.images import BadImage, decode

_REGION = pa.struct(
    [("text", pa.string()), ("confidence", pa.float32()), ("area_fraction", pa.float32())]
)
_MULTIPLE = 32  # the detector works on multiples of 32 pixels and sees nothing below one


class TextSpotting:
    """Spotted regions in reading order: `text` (one line, may hold several words), `confidence`,
    `area_fraction` of the image.

    min_side: images with a shorter side below are enlarged to it (bicubic). On 64-pixel drawings
        (25 rendered words, 26 legible ones of the sample pool) 64 finds all; 128 and more finds
        none more, misses small print and invents more single letters. On 32-pixel drawings 21 of 25
        words are found without enlarging and 25 with 64.
    max_side: larger images are reduced to it.
    min_confidence: regions read with less are left out.
    threads: of the engine's own; parallelism comes from the tasks.
    Price, a CPU core: 4 ms an image at min_side 64 (45 s for 11,000), 5 at 96, 7 at 128, 15 at 192,
        25 at 256, 70 at 384 pixels.
    An image on which the engine fails gets no regions and the exception's name in
        `text_spotting_error`.
    """

    name = "text_spotting"
    version = 1
    needs_images = True
    reads = ()
    inputs: ClassVar[dict[str, str]] = {}
    columns: ClassVar[dict[str, pa.DataType]] = {
        "spotted_text": pa.list_(_REGION),
        "text_spotting_error": pa.string(),
    }

    def __init__(
        self,
        *,
        min_side: int = 64,
        max_side: int = 960,
        min_confidence: float = 0.5,
        threads: int = 1,
    ):
        if not 1 <= min_side <= max_side:
            raise ValueError(
                f"min_side {min_side} and max_side {max_side}: need 1 <= min_side <= max_side"
            )
        if not 0.0 <= min_confidence <= 1.0:
            raise ValueError(f"min_confidence {min_confidence} is outside [0, 1]")
        if threads < 1:
            raise ValueError(f"threads {threads}: need at least 1")
        self.min_side = min_side
        self.max_side = max_side
        self.min_confidence = min_confidence
        self.threads = threads
        self._engine: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}

    def build(self) -> None:
        """Load the engine, once per process."""
        if self._engine is not None:
            return
        from rapidocr_onnxruntime import RapidOCR

        self._engine = RapidOCR(
            det_limit_side_len=_MULTIPLE,
            det_limit_type="min",
            text_score=self.min_confidence,
            intra_op_num_threads=self.threads,
            inter_op_num_threads=1,
        )

    def scaled(self, image: Image.Image) -> np.ndarray:
        """(H, W, 3) BGR pixels as the engine sees them: within [min_side, max_side], edges repeated
        up to 32 pixels.
        """
        short, long = min(image.size), max(image.size)
        factor = min(max(1.0, self.min_side / short), self.max_side / long)
        if factor != 1.0:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image)[:, :, ::-1]
        missing = [max(0, _MULTIPLE - side) for side in pixels.shape[:2]]
        padding = [(gap // 2, math.ceil(gap / 2)) for gap in missing]
        return np.ascontiguousarray(np.pad(pixels, [*padding, (0, 0)], mode="edge"))

    def spot(self, image: Image.Image) -> list[dict[str, Any]]:
        """The regions of one RGB image."""
        self.build()
        pixels = self.scaled(image)
        # The orientation classifier is left out: it costs time and drawn words are upright.
        found, _ = self._engine(pixels, use_cls=False)
        area = pixels.shape[0] * pixels.shape[1]
        return [
            {
                "text": text,
                "confidence": float(confidence),
                "area_fraction": min(1.0, _polygon_area(box) / area),
            }
            for box, text, confidence in found or []
        ]

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Read every image; one that fails gets no regions and a reason."""
        self.build()  # outside the try: without an engine the run must stop, unlike for a bad image
        rows = []
        for sample in batch:
            regions, problem = [], None
            try:
                regions = self.spot(decode(sample["image"]))
            except BadImage as error:
                problem = error.reason
            except Exception as error:  # whatever one image does to the engine must not end the run
                problem = f"engine_{type(error).__name__}"
            rows.append({"spotted_text": regions, "text_spotting_error": problem})
        return rows


def _polygon_area(corners: list[list[float]]) -> float:
    x, y = np.asarray(corners, np.float64).T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
