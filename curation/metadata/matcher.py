"""Which metadata entries does a caption mention? The matching of MetaCLIP (arXiv:2309.16671) and
MetaCLIP 2 (2507.22062).

An entry matches where it stands between spaces in the spaced caption. Such entries are found by a
join of tokens (`token_join`). MetaCLIP 2 asks for no space beside CJK-like and punctuation edges;
entries with such an edge go to one Aho-Corasick automaton that finds all overlapping matches. Both
are exact; tests hold them against the reference's linear scan.
Price: benchmarks/results/matching.md.
"""

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa

from curation.metadata.spacing import spaced
from curation.metadata.token_join import TokenJoin
from curation.metadata.tokens import encoded

Rule = Literal["metaclip", "metaclip2"]

# MetaCLIP 2: scripts written without spaces. Kana and Hangul are not among them in the reference,
# which we follow.
_UNSPACED_RANGES = (
    (0x4E00, 0x9FFF),  # CJK unified, then its extensions A to F, compatibility forms and radicals
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2CEB0, 0x2EBEF),
    (0xF900, 0xFAFF),
    (0x2E80, 0x2EFF),
    (0x2F00, 0x2FDF),
    (0x2FF0, 0x2FFF),
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x0F00, 0x0FFF),  # Tibetan
)
_UNSPACED_MARKS = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")


def _unspaced(character: str) -> bool:
    code = ord(character)
    return character in _UNSPACED_MARKS or any(
        low <= code <= high for low, high in _UNSPACED_RANGES
    )


def padded(entry: str, rule: Rule) -> str:
    """What must occur in the spaced caption for the entry to match.

    "metaclip": a space on both sides. "metaclip2": no space beside an edge that is CJK-like or
        punctuation.
    """
    if rule == "metaclip":
        return f" {entry} "
    before = "" if _unspaced(entry[0]) else " "
    after = "" if _unspaced(entry[-1]) else " "
    return before + entry + after


class EntryMatcher:
    """Finds all entries in captions, nested and overlapping ones too; case-sensitive.

    entries: distinct non-empty strings; the position is the id. rule: see `padded`.
    Raises ValueError for an unknown rule and for empty or repeated entries (an id would have no
        meaning of its own).
    """

    def __init__(self, *, entries: Sequence[str], rule: Rule = "metaclip"):
        if rule not in ("metaclip", "metaclip2"):
            raise ValueError(f"unknown rule {rule!r}: use metaclip or metaclip2")
        _check_entries(entries)
        wanted = [padded(entry, rule) for entry in entries]
        between = np.array([w == f" {e} " for w, e in zip(wanted, entries, strict=True)], bool)
        self._joined = np.flatnonzero(between).astype(np.int32)
        self._join = TokenJoin([entries[i] for i in self._joined])
        self._scanned = np.flatnonzero(~between).astype(np.int32)
        self._automaton = None
        if len(self._scanned):
            import ahocorasick_rs

            # The contiguous NFA is the fastest of the three and needs a tenth of the DFA's memory
            # at 500,000 entries.
            self._automaton = ahocorasick_rs.AhoCorasick(
                [wanted[i] for i in self._scanned],
                matchkind=ahocorasick_rs.MatchKind.Standard,
                implementation=ahocorasick_rs.Implementation.ContiguousNFA,
            )

    def match(self, captions: Sequence[str]) -> list[list[int]]:
        """Sorted distinct ids per caption. Raises ValueError for a caption that is not a string,
        naming its position.
        """
        offsets, ids = self.match_flat(captions)
        every, bounds = ids.tolist(), offsets.tolist()
        return [every[start:stop] for start, stop in pairwise(bounds)]

    def match_flat(
        self, captions: Sequence[str] | pa.Array | pa.ChunkedArray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same without a Python object per caption: (offsets, ids), caption i's ids are
        ids[offsets[i]:offsets[i + 1]]; offsets int64 (len + 1), ids int32.
        """
        texts = encoded(captions)
        offsets, ids = self._join.match(texts)
        ids = self._joined[ids]
        if self._automaton is None:
            return offsets, ids
        rows = np.repeat(np.arange(len(texts)), np.diff(offsets))
        more_rows, more_ids = self._scan(texts)
        rows, ids = np.concatenate([rows, more_rows]), np.concatenate([ids, more_ids])
        order = np.lexsort((ids, rows))  # no pair is found by both
        counts = np.bincount(rows, minlength=len(texts))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), ids[order]

    def _scan(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(row, id) of the automaton's matches, distinct, by row."""
        find = self._automaton.find_matches_as_indexes
        counts, ids = [], []
        for caption in texts.cast(pa.large_string()):
            found = {match[0] for match in find(spaced(caption.as_py()), overlapping=True)}
            counts.append(len(found))
            ids += found
        rows = np.repeat(np.arange(len(texts)), np.array(counts, np.int64))
        return rows, self._scanned[np.array(ids, np.int64)]

    def match_lists(self, captions: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.ListArray:
        """The same as an Arrow column, list<int32>."""
        offsets, ids = self.match_flat(captions)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids))


def _check_entries(entries: Sequence[str]) -> None:
    if isinstance(entries, str):
        raise ValueError("entries is one string: give a list of strings")
    wrong = [i for i, entry in enumerate(entries) if not isinstance(entry, str) or not entry]
    if wrong:
        raise ValueError(
            f"{len(wrong)} entries are empty or not strings, first at positions "
            f"{wrong[:5]}: remove them"
        )
    for position, entry in enumerate(entries):
        if not entry.isascii() and entry.encode("utf-8", "ignore").decode() != entry:
            raise ValueError(
                f"entry {position}, {entry!r}, holds half a character (a lone surrogate): remove it"
            )
    if len(set(entries)) < len(entries):
        seen: set[str] = set()
        repeated = [entry for entry in entries if entry in seen or seen.add(entry)]
        raise ValueError(
            f"{len(repeated)} entries occur more than once, such as {repeated[:5]}: "
            "keep one of each (ids are positions in the list)"
        )
