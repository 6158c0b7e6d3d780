"""Selector: captions that only spell what is written in the image ("Parrot Captions Teach CLIP to
Spot Text", arXiv:2312.14232). It scores; it drops only what a preset asks it to.

| subset | rule | preset |
|---|---|---|
| the paper's 100 M | no spotted text, CLIP score > 0.3, aesthetic > 4.5, deduplicated | see below |
| without text | no spotted text | parrot_no_text |
| ours | at most 40 % of the caption's words spotted | parrot_rate |

The first is parrot_text_debiased, with an aesthetic column parrot_text_debiased_aesthetic; another
selector removes the duplicates.

About half of LAION-2B's images hold text, and 30 % of its caption words are in it. Training on the
100 M costs general accuracy: ImageNet 52.6 % against 63.3 (OpenAI) and 66.6 (LAION-2B).
"""

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from rapidfuzz.distance import Levenshtein

# Scripts without spaces that OCR reads: every character is a word. Kana, Han.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))


def word_list(text: str) -> list[str]:
    """Case-folded runs of letters, marks and digits, in order; each Han character or kana is a word
    of its own.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(map(_piece, text)).split()


@lru_cache(maxsize=1 << 16)
def _piece(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if category == "Cf":  # joiners and soft hyphens are inside words
        return ""
    if category[0] not in "LMN":
        return " "
    unspaced = code >= 0x20000 or any(low <= code <= high for low, high in _UNSPACED)
    return f" {character} " if unspaced else character


def words(text: str) -> set[str]:
    """Distinct words."""
    return set(word_list(text))


def concurrent_words(caption: str, spotted: Iterable[str]) -> set[str]:
    """Words of the caption that are also spotted, whole and case-folded."""
    return words(caption) & words(" ".join(spotted))


def concurrent_word_rate(caption: str, spotted: Iterable[str]) -> float:
    """|words(caption) and words(spotted)| / |words(caption)|, in [0, 1]; 0 for a caption without
    words.
    """
    total = len(words(caption))
    return len(concurrent_words(caption, spotted)) / total if total else 0.0


def fuzzy_matches(
    caption: Sequence[str], spotted: Iterable[str], *, min_similarity: float
) -> list[bool]:
    """Which words have a spotted one whose similarity, 1 - edits / letters of the longer, reaches
    min_similarity.
    """
    there = set(spotted)
    return [
        word in there
        or any(
            Levenshtein.normalized_similarity(word, other, score_cutoff=min_similarity)
            >= min_similarity
            for other in there
        )
        for word in caption
    ]


def longest_fuzzy_match(
    caption: str, spotted: Iterable[str], *, min_similarity: float = 0.8
) -> int:
    """Words in the longest run of the caption whose words are all spotted, up to small misreadings.

    Where in the image they are spotted does not matter: the order of an engine's regions is not the
    order of reading. min_similarity: of a word, see `fuzzy_matches`; 0.8 forgives one letter of
    five.
    """
    longest = run = 0
    there = word_list(" ".join(spotted))
    for matched in fuzzy_matches(word_list(caption), there, min_similarity=min_similarity):
        run = run + 1 if matched else 0
        longest = max(longest, run)
    return longest


def legible(regions: Sequence[Mapping[str, Any]] | None, min_confidence: float = 0.5) -> list[str]:
    """The texts of one `spotted_text` value that were read surely enough."""
    return [r["text"] for r in regions or [] if r["confidence"] >= min_confidence]


def co_embedded_text_rates(
    pairs: Iterable[tuple[str, Sequence[str]]], *, min_similarity: float = 0.8
) -> dict[str, float]:
    """How much a whole dataset parrots; `pairs` are (caption, spotted texts).

    image_text_rate: share of images with text.  concurrent_pair_rate: share of pairs with at least
    one concurrent word.  co_embedded_text_rate: concurrent words over caption words, both distinct
    within a pair and summed over all pairs; ..._with_text: over the pairs whose image holds text;
    fuzzy_...: words that match as in `fuzzy_matches`. 0 where there is nothing to divide by.
    """
    total = with_text = parrots = all_words = text_words = concurrent = fuzzy = 0
    for caption, spotted in pairs:
        mine = words(caption)
        total, all_words = total + 1, all_words + len(mine)
        if not spotted:
            continue
        there = words(" ".join(spotted))
        shared = len(mine & there)
        with_text, text_words = with_text + 1, text_words + len(mine)
        parrots, concurrent = parrots + (shared > 0), concurrent + shared
        fuzzy += sum(fuzzy_matches(sorted(mine), there, min_similarity=min_similarity))
    return {
        "pairs": total,
        "image_text_rate": with_text / max(total, 1),
        "concurrent_pair_rate": parrots / max(total, 1),
        "co_embedded_text_rate": concurrent / max(all_words, 1),
        "co_embedded_text_rate_with_text": concurrent / max(text_words, 1),
        "fuzzy_co_embedded_text_rate": fuzzy / max(all_words, 1),
    }


class Parrot:
    """Scores every pair; drops nothing by default.

    Scores, null for an image that the engine could not read:
        concurrent_word_rate: the paper's measure, the share of a caption's distinct words that are
            also spotted in the image, in [0, 1];
        longest_fuzzy_match: words of the longest run of the caption that is spotted, forgiving
            misread letters: a copied phrase, where the rate may be chance;
        the third, text_area_fraction, is made by the annotator and travels with them.
    Drops, in this order, the first reason counts; null switches a rule off:
        max_text_area_fraction: "text" above it, and "unread_image" where the engine failed; 0 drops
            every image with text.
        above: column -> a bound that the value must exceed (">", as in the released subset);
            "low_<column>" otherwise, also for null and NaN.
        max_concurrent_rate: "parrot" above it; 0 drops every caption that shares a word with its
            image's text. Images that could not be read stay: nothing is known against them.
    min_concurrent_words: for "parrot", fewer shared words are taken for chance.
    min_confidence: spotted regions read with less do not count; the area counts all that the
        annotator kept.
    min_similarity: of a word with a misread one, for longest_fuzzy_match.
    Price: needs the text_spotting annotation; then seconds. Dropped by the rate, captions that name
        a visible word ("SOS button") go too.
    """

    name = "parrot"
    version = 2
    columns: ClassVar[dict[str, pa.DataType]] = {
        "concurrent_word_rate": pa.float64(),
        "longest_fuzzy_match": pa.float64(),
    }

    def __init__(
        self,
        *,
        max_concurrent_rate: float | None = None,
        min_concurrent_words: int = 1,
        max_text_area_fraction: float | None = None,
        above: Mapping[str, float] | None = None,
        min_confidence: float = 0.5,
        min_similarity: float = 0.8,
    ):
        fractions = {
            "max_concurrent_rate": max_concurrent_rate,
            "max_text_area_fraction": max_text_area_fraction,
            "min_confidence": min_confidence,
            "min_similarity": min_similarity,
        }
        for knob, value in fractions.items():
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{knob} {value} is outside [0, 1]")
        if min_concurrent_words < 1:
            raise ValueError(f"min_concurrent_words {min_concurrent_words}: need at least 1")
        for column, bound in (above or {}).items():
            if not math.isfinite(bound):
                raise ValueError(f"above {column}: {bound} is not a number to compare with")
        self.max_concurrent_rate = max_concurrent_rate
        self.min_concurrent_words = min_concurrent_words
        self.max_text_area_fraction = max_text_area_fraction
        self.above = dict(above or {})
        self.min_confidence = min_confidence
        self.min_similarity = min_similarity
        facts = ("caption", "spotted_text", "text_spotting_error", "text_area_fraction")
        self.reads = (*facts, *(column for column in self.above if column not in facts))

    def measure(self, part: pa.Table) -> None:
        """Nothing: the decision is taken pair by pair."""

    def combine(self, measures: list[Any]) -> None:
        """Nothing."""

    def apply(self, part: pa.Table, combined: None, seed: int) -> pa.Array:
        reasons = np.full(part.num_rows, None, object)
        # the last written reason counts, so the rules come in reverse
        if self.max_concurrent_rate is not None:
            reasons[self._parrots(part)] = "parrot"
        for column, bound in reversed(self.above.items()):
            reasons[~(_numbers(part, column) > bound)] = f"low_{column}"
        if self.max_text_area_fraction is not None:
            area = _numbers(part, "text_area_fraction")
            reasons[area > self.max_text_area_fraction] = "text"
            reasons[np.isnan(area)] = "unread_image"
        return pa.array(reasons, pa.string())

    def score(self, part: pa.Table, combined: None, seed: int) -> dict[str, pa.Array]:
        rates, runs = [], []
        for caption, spotted, error in self._pairs(part):
            rates.append(None if error else concurrent_word_rate(caption, spotted))
            run = longest_fuzzy_match(caption, spotted, min_similarity=self.min_similarity)
            runs.append(None if error else float(run))
        return {
            "concurrent_word_rate": pa.array(rates, pa.float64()),
            "longest_fuzzy_match": pa.array(runs, pa.float64()),
        }

    def _pairs(self, part: pa.Table) -> Iterable[tuple[str, list[str], str | None]]:
        """(caption, spotted texts, the engine's error) of every row. No text, no caption: it would
        not be looked at, and most images have none.
        """
        columns = (part[name].to_pylist() for name in self.reads[:3])
        for caption, regions, error in zip(*columns, strict=True):
            spotted = legible(regions, self.min_confidence)
            yield (caption or "") if spotted else "", spotted, error

    def _parrots(self, part: pa.Table) -> np.ndarray:
        shared = [
            (len(concurrent_words(caption, spotted)), concurrent_word_rate(caption, spotted))
            for caption, spotted, _ in self._pairs(part)
        ]
        counts, rates = np.array(shared, np.float64).reshape(-1, 2).T
        return (counts >= self.min_concurrent_words) & (rates > self.max_concurrent_rate)


def _numbers(part: pa.Table, column: str) -> np.ndarray:
    """float64, NaN for null."""
    return part[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
