"""Selector: the rules that LAION's crawlers put before the CLIP score (LAION-400M,
arXiv:2111.02114; LAION-5B, 2210.08402; the numbers are their workers' code).

| rule | LAION-400M | LAION-5B | here |
|---|---|---|---|
| caption | >= 5 characters | the same | min_characters: 5 |
| file | >= 5,000 bytes | the same | min_bytes: 5000 |
| picture | w * h <= 89,478,484 | the same | max_pixels: 89478484 |
| URL | .svg .gif .webp data:image javascript: mailto: | .svg .gif data: javascript: | blocked |
| host | - | <= 60 characters | max_host_characters: 60 |
| CLIP score, B/32 | >= 0.3 | >= 0.28; multilingual >= 0.26 | select/clip_score, behind this |
| language | English (cld2) | all, apart (cld3) | select/english, behind this |
| long captions | - | cut at 2,000 characters | annotate.language.max_characters |
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa


def host_length(url: str) -> int:
    """Characters of the host, without user and port; 0 without one. A URL that cannot be parsed has
    the length of what stands between "//" and the next "/".
    """
    try:
        return len(urlsplit(url).hostname or "")
    except ValueError:  # such as an unclosed bracket
        return len(url.partition("//")[2].partition("/")[0])


class Laion:
    """Keeps what satisfies every rule; null (an empty list for blocked_urls) switches one off.

    Reasons, in this order, the first one counts; what lies exactly on a bound stays:
        "short_caption": fewer than min_characters code points, white space at both ends not counted
            (LAION strips first);
        "blocked_url": the lower-cased URL holds one of blocked_urls, anywhere; a missing URL stays;
        "long_host": a host of more than max_host_characters;
        "small_file": fewer than min_bytes bytes of image;
        "large_image": more than max_pixels pixels. Ingest refuses above its own ingest.max_pixels
            first, 50 million by default.
    Nothing is cut: the pool's captions are its own, and a text tower reads 77 tokens of them.
    Price: one pass over captions and URLs, 4 us each.
    """

    name = "laion"
    version = 1
    reads = ("caption", "url", "num_bytes", "width", "height")

    def __init__(
        self,
        *,
        min_characters: int | None = 5,
        blocked_urls: Sequence[str] = (".svg", ".gif", "data:", "javascript:"),
        max_host_characters: int | None = 60,
        min_bytes: int | None = 5000,
        max_pixels: int | None = 89_478_484,
    ):
        if isinstance(blocked_urls, str) or not all(blocked_urls):
            raise ValueError(
                f"blocked_urls {blocked_urls!r}: need a list of non-empty strings, [] for none"
            )
        bounds = {
            "min_characters": min_characters,
            "max_host_characters": max_host_characters,
            "min_bytes": min_bytes,
            "max_pixels": max_pixels,
        }
        for knob, value in bounds.items():
            if value is not None and value < 0:
                raise ValueError(f"{knob} {value} is negative: set null to switch the rule off")
        self.min_characters = min_characters
        self.blocked_urls = tuple(text.lower() for text in blocked_urls)
        self.max_host_characters = max_host_characters
        self.min_bytes, self.max_pixels = min_bytes, max_pixels

    def measure(self, part: pa.Table) -> None:
        """Nothing: each pair is judged alone."""

    def combine(self, measures: list[Any]) -> None:
        """Nothing."""

    def apply(self, part: pa.Table, combined: None, seed: int) -> pa.Array:
        """The first rule that a pair breaks, or null."""
        reasons = np.full(part.num_rows, None, object)
        # the last written reason counts, so the rules come in reverse
        width, height, num_bytes = (
            part[name].to_numpy() for name in ("width", "height", "num_bytes")
        )
        if self.max_pixels is not None:
            reasons[width.astype(np.int64) * height > self.max_pixels] = "large_image"
        if self.min_bytes is not None:
            reasons[num_bytes < self.min_bytes] = "small_file"
        urls = [(url or "").lower() for url in part["url"].to_pylist()]
        if self.max_host_characters is not None:
            long = [host_length(url) > self.max_host_characters for url in urls]
            reasons[np.array(long, bool)] = "long_host"
        if self.blocked_urls:
            blocked = [any(text in url for text in self.blocked_urls) for url in urls]
            reasons[np.array(blocked, bool)] = "blocked_url"
        if self.min_characters is not None:
            captions = part["caption"].to_pylist()
            short = [len((caption or "").strip()) < self.min_characters for caption in captions]
            reasons[np.array(short, bool)] = "short_caption"
        return pa.array(reasons, pa.string())
