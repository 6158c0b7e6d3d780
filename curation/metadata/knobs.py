"""What decides about an entry list (MetaCLIP, arXiv:2309.16671, sec. 3.1; MetaCLIP 2,
arXiv:2507.22062).
"""

from dataclasses import dataclass
from typing import Any, Literal

_JUST_ABOVE_30 = 30.000000000000004  # MetaCLIP 2 asks for more than 30, MetaCLIP for 30


def _need_one(knobs: Any, *names: str) -> None:
    for name in names:
        value = getattr(knobs, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: need at least 1")


@dataclass(frozen=True, kw_only=True)
class EntryKnobs:
    """What decides about the list, besides Wikipedia.

    min_unigram_count: occurrences a word of the pool needs. MetaCLIP: 100 in English Wikipedia.
    min_bigram_count: occurrences a word pair needs; rare pairs have the highest PMI and mean the
        least.
    min_pmi: bits by which a pair is more frequent than by chance. MetaCLIP: 30, which only a corpus
        of 2^30 words can reach; a pool of W words has pairs up to log2(W).
    wordnet: false leaves the English lemmas out.
    lower_case: lower-case captions and Wikipedia first; for matching with lower_case=true.
    language: the list's language, written into it; the domain of hourly page views.
    unspaced: pairs are written without the space between them, for languages that have none. Their
        text must come cut into words by spaces.
    max_entries: the list ends there. MetaCLIP: 500,000.
    """

    min_unigram_count: int = 5
    min_bigram_count: int = 5
    min_pmi: float = 5.0
    wordnet: bool = True
    lower_case: bool = False
    language: str = "en"
    unspaced: bool = False
    max_entries: int | None = None

    def __post_init__(self) -> None:
        _need_one(self, "min_unigram_count", "min_bigram_count", "max_entries")


@dataclass(frozen=True, kw_only=True)
class WikipediaKnobs:
    """What decides about Wikipedia's part; see WIKIPEDIA for the papers' values.

    min_unigram_count, min_bigram_count, min_pmi: as for the pool.
    min_title_views: views that a title needs, in all files together.
    min_hourly_views, mobile: see `wikipedia.page_views`.
    caps: "metaclip2" ends unigrams at a tenth of the distinct words, titles at 76 % of the distinct
        ones, and unigrams, bigrams, titles at 251,465, 100,646, 61,235 (the sizes in English
        MetaCLIP). Only entries that are new count.
    """

    min_unigram_count: int = 100
    min_bigram_count: int = 1
    min_pmi: float = 30.0
    min_title_views: int = 70
    min_hourly_views: int = 50
    mobile: bool = False
    caps: Literal["none", "metaclip2"] = "none"

    def __post_init__(self) -> None:
        _need_one(self, "min_unigram_count", "min_bigram_count", "min_title_views")
        if self.caps not in ("none", "metaclip2"):
            raise ValueError(f"unknown caps {self.caps!r}: use none or metaclip2")


WIKIPEDIA = {
    "metaclip": WikipediaKnobs(),
    "metaclip2": WikipediaKnobs(
        min_unigram_count=1,
        min_pmi=_JUST_ABOVE_30,
        min_title_views=1,
        min_hourly_views=1,
        mobile=True,
        caps="metaclip2",
    ),
}
