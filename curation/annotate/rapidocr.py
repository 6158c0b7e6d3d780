"""Text spotting engine: rapidocr-onnxruntime (PP-OCRv4 detector and recogniser; Chinese and
English).
"""

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from curation.annotate.text_spotter import EngineUnavailable, Region

Provider = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_MULTIPLE = 32  # the detector works on multiples of 32 pixels and sees nothing below one


class RapidOcr:
    """Words with their boxes. The engine reads lines; a line is cut at its spaces, at the places
    of its letters, so that a word has a box and a confidence (mean over its letters) of its own.

    It enlarges every image to 736 pixels by default, which is what makes it slow; here it sees the
    pixels as they are given, with edges repeated up to 32.
    provider: of onnxruntime, for the detector and the recogniser. "cuda" needs onnxruntime-gpu in
        the place of onnxruntime; the device is the first of CUDA_VISIBLE_DEVICES.
    threads: of the engine's own; parallelism comes from the tasks.
    The orientation classifier is left out: it costs time and drawn words are upright.
    Price: the annotator's docstring.
    """

    def __init__(self, *, provider: Provider = "cpu", threads: int = 1):
        if provider not in _PROVIDERS:
            raise ValueError(f"unknown provider {provider!r}: use cpu or cuda")
        if threads < 1:
            raise ValueError(f"threads {threads}: need at least 1")
        self.provider = provider
        self.threads = threads
        self._engine: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}

    def build(self) -> None:
        """Load the models, once per process. Raises EngineUnavailable without the provider."""
        if self._engine is not None:
            return
        from onnxruntime import get_available_providers
        from rapidocr_onnxruntime import RapidOCR

        wanted, available = _PROVIDERS[self.provider], get_available_providers()
        if wanted not in available:
            raise EngineUnavailable(
                f"provider={self.provider}: this onnxruntime has no {wanted} (it has: "
                f"{', '.join(available)}): install onnxruntime-gpu, or set provider to cpu"
            )
        cuda = self.provider == "cuda"
        engine = RapidOCR(
            det_limit_side_len=_MULTIPLE,
            det_limit_type="min",
            det_use_cuda=cuda,
            rec_use_cuda=cuda,
            intra_op_num_threads=self.threads,
            inter_op_num_threads=1,
        )
        # onnxruntime falls back to the CPU with a warning when CUDA's libraries do not load
        running = engine.text_det.infer.session.get_providers()[0]
        if running != wanted:
            raise EngineUnavailable(
                f"provider={self.provider}: onnxruntime runs {running}: its CUDA libraries do not "
                "load; mend that installation, or set provider to cpu"
            )
        self._engine = engine

    def spot(self, image: np.ndarray) -> list[Region]:
        """The words of one image, (H, W, 3) uint8 RGB, line by line."""
        self.build()
        height, width = image.shape[:2]
        missing = [max(0, _MULTIPLE - side) for side in (height, width)]
        padding = [(gap // 2, math.ceil(gap / 2)) for gap in missing]
        pixels = image[:, :, ::-1]
        if any(missing):
            pixels = np.pad(pixels, [*padding, (0, 0)], mode="edge")
        lines, _ = self._engine(
            np.ascontiguousarray(pixels), use_cls=False, return_word_box=True, text_score=0.0
        )
        before = (padding[1][0], padding[0][0])
        return [
            Region(text, confidence, _unpadded(polygon, before, (width, height)))
            for line in lines or []
            for text, confidence, polygon in _words(*line)
        ]


def _words(
    corners: list[list[float]],
    text: str,
    confidence: float,
    boxes: list[list[list[float]]],
    letters: list[str],
    confidences: list[float],
) -> Iterator[tuple[str, float, list[list[float]]]]:
    """(text, confidence, corners) of each word of a line.

    boxes: four corners of each letter, spaces included, clockwise from its upper left.
    """
    if not len(text) == len(boxes) == len(confidences):  # the letters cannot be told apart
        if text.strip():
            yield text, float(confidence), corners
        return
    for word in re.finditer(r"\S+", text):
        first, last = boxes[word.start()], boxes[word.end() - 1]
        mean = float(np.mean(confidences[word.start() : word.end()]))
        yield word[0], mean, [first[0], last[1], last[2], first[3]]


def _unpadded(
    corners: list[list[float]], before: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[float, float], ...]:
    """Corners in the image without its padding, cut at its edges."""
    return tuple(
        (
            min(max(float(x) - before[0], 0.0), float(size[0])),
            min(max(float(y) - before[1], 0.0), float(size[1])),
        )
        for x, y in corners
    )
