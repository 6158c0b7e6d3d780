"""Selector: DataComp's basic filter (arXiv:2304.14108; baselines/apply_filter.py): the
cheap rules on caption and picture size that every web pool is put through first.

| rule | DataComp's code | here |
|---|---|---|
| English | fastText lid.176 == "en" | languages: [en], of the language annotator |
| words | len(text.split()) > 2 | min_words: 3 |
| length | len(text) > 5 | min_characters: 6 |
| size | min(w, h) >= 200 | min_side: 200 |
| shape | max(w, h) / min(w, h) <= 3.0 | max_aspect_ratio: 3.0 |
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


class Basic:
    """Keeps what satisfies every rule; null switches a rule off. All bounds are inclusive.

    Reasons, in this order, the first one counts:
        "language": not one of languages (null, and "other" unless listed, go too);
        "language_score": surer than min_language_score is needed; a null score goes;
        "few_words": fewer than min_words words, cut at white space as str.split does, so that a
            sentence in Chinese is one word;
        "short_caption": fewer than min_characters code points, white space counted;
        "long_caption": more than max_characters code points;
        "small_image": the shorter side below min_side pixels;
        "aspect_ratio": longer side / shorter side above max_aspect_ratio.
    Width and height are those of the pool's file; DataComp takes the original's, before it was
    scaled down by the download.
    Needs annotate/language for the first two. Price: one pass over the captions, 1 us each.
    """

    name = "basic"
    version = 1

    def __init__(
        self,
        *,
        languages: Sequence[str] | None = ("en",),
        min_language_score: float | None = None,
        min_words: int | None = 3,
        min_characters: int | None = 6,
        max_characters: int | None = None,
        min_side: int | None = 200,
        max_aspect_ratio: float | None = 3.0,
    ):
        if isinstance(languages, str) or (languages is not None and not languages):
            raise ValueError(f"languages {languages!r}: need a list such as [en], or null for all")
        if min_language_score is not None and not 0.0 <= min_language_score <= 1.0:
            raise ValueError(f"min_language_score {min_language_score} is outside [0, 1]")
        if max_aspect_ratio is not None and not max_aspect_ratio >= 1.0:
            raise ValueError(f"max_aspect_ratio {max_aspect_ratio}: a square has 1, so need >= 1")
        sizes = {
            "min_words": min_words,
            "min_characters": min_characters,
            "max_characters": max_characters,
            "min_side": min_side,
        }
        for knob, value in sizes.items():
            if value is not None and value < 0:
                raise ValueError(f"{knob} {value} is negative: set null to switch the rule off")
        self.languages = None if languages is None else frozenset(languages)
        self.min_language_score = min_language_score
        self.min_words, self.min_characters = min_words, min_characters
        self.max_characters = max_characters
        self.min_side, self.max_aspect_ratio = min_side, max_aspect_ratio
        self.reads = ("caption", "width", "height")
        if languages is not None:
            self.reads += ("language",)
        if min_language_score is not None:
            self.reads += ("language_score",)

    def measure(self, part: pa.Table) -> None:
        """Nothing: each pair is judged alone."""

    def combine(self, measures: list[Any]) -> None:
        """Nothing."""

    def apply(self, part: pa.Table, combined: None, seed: int) -> pa.Array:
        """The first rule that a pair breaks, or null."""
        captions = [caption or "" for caption in part["caption"].to_pylist()]
        width, height = (
            part[side].cast(pa.float64()).to_numpy(zero_copy_only=False)
            for side in ("width", "height")
        )
        reasons = np.full(part.num_rows, None, object)
        # The last written reason counts, so the rules come in reverse. Each names what is kept, so
        # that NaN and null are not.
        if self.max_aspect_ratio is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.maximum(width, height) / np.minimum(width, height)
            reasons[~(ratio <= self.max_aspect_ratio)] = "aspect_ratio"
        if self.min_side is not None:
            reasons[~(np.minimum(width, height) >= self.min_side)] = "small_image"
        lengths = np.fromiter(map(len, captions), np.int64, len(captions))
        if self.max_characters is not None:
            reasons[lengths > self.max_characters] = "long_caption"
        if self.min_characters is not None:
            reasons[lengths < self.min_characters] = "short_caption"
        if self.min_words is not None:
            words = np.fromiter((len(c.split()) for c in captions), np.int64, len(captions))
            reasons[words < self.min_words] = "few_words"
        if self.min_language_score is not None:
            score = part["language_score"].cast(pa.float64()).to_numpy(zero_copy_only=False)
            reasons[~(score >= self.min_language_score)] = "language_score"
        if self.languages is not None:
            spoken = [code in self.languages for code in part["language"].to_pylist()]
            reasons[~np.array(spoken, bool)] = "language"
        return pa.array(reasons, pa.string())
