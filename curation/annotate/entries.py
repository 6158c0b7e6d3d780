"""Which metadata entries does a caption mention? The matching of MetaCLIP (arXiv:2309.16671) and
MetaCLIP 2 (2507.22062).

An entry matches where it stands between spaces in the spaced caption. One Aho-Corasick automaton
over the padded entries finds all overlapping matches of both rules, exactly; tests hold it against
the reference's linear scan.
Price: building takes 0.5 s and 33 MB for 120,000 entries; matching runs at about 120,000 captions a
    second and core.
"""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from curation.metadata.spacing import spaced

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
    Raises ValueError for an unknown rule and for empty or repeated entries (an automaton keeps one
        id per string).
    """

    def __init__(self, *, entries: Sequence[str], rule: Rule = "metaclip"):
        if rule not in ("metaclip", "metaclip2"):
            raise ValueError(f"unknown rule {rule!r}: use metaclip or metaclip2")
        _check_entries(entries)
        import ahocorasick_rs

        # The contiguous NFA is the fastest of the three and needs a tenth of the DFA's memory at
        # 500,000 entries.
        self._automaton = ahocorasick_rs.AhoCorasick(
            [padded(entry, rule) for entry in entries],
            matchkind=ahocorasick_rs.MatchKind.Standard,
            implementation=ahocorasick_rs.Implementation.ContiguousNFA,
        )

    def match(self, captions: Sequence[str]) -> list[list[int]]:
        """Sorted distinct ids per caption. Raises ValueError for a caption that is not a string,
        naming its position.
        """
        find = self._automaton.find_matches_as_indexes
        found = []
        for position, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(
                    f"caption {position} is {caption!r}, not a string: drop such pairs first"
                )
            found.append(sorted({match[0] for match in find(spaced(caption), overlapping=True)}))
        return found


def _check_entries(entries: Sequence[str]) -> None:
    if isinstance(entries, str):
        raise ValueError("entries is one string: give a list of strings")
    wrong = [i for i, entry in enumerate(entries) if not isinstance(entry, str) or not entry]
    if wrong:
        raise ValueError(
            f"{len(wrong)} entries are empty or not strings, first at positions "
            f"{wrong[:5]}: remove them"
        )
    if len(set(entries)) < len(entries):
        seen: set[str] = set()
        repeated = [entry for entry in entries if entry in seen or seen.add(entry)]
        raise ValueError(
            f"{len(repeated)} entries occur more than once, such as {repeated[:5]}: "
            "keep one of each (ids are positions in the list)"
        )


def read_entries(path: str | Path) -> list[str]:
    """The entry list of a JSON file: a plain list of strings (MetaCLIP's metadata.json) or an
    object with "entries".
    """
    if not Path(path).is_file():
        raise ValueError(
            f"entry list {path} does not exist: build it with `python -m curation.metadata.build`"
        )
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    entries = content.get("entries") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError(
            f"{path} holds neither a list of strings nor an object with a list under 'entries'"
        )
    return entries


class Entries:
    """Annotator: the ids of the metadata entries that a caption mentions.

    entries: path of the list (see `read_entries`).
    rule: "metaclip", or "metaclip2" which also strips the caption first, as that pipeline does.
    lower_case: match the lower-cased caption. The reference is case-sensitive ("Dog" does not match
        `dog`, WordNet is in lower case); true finds more, and needs an entry list without
        upper-case letters, else ValueError.
    """

    name = "entries"
    version = 1
    needs_images = False
    reads = ("caption",)
    columns: ClassVar[dict[str, pa.DataType]] = {"entries": pa.list_(pa.int32())}

    def __init__(self, *, entries: str, rule: Rule = "metaclip", lower_case: bool = False):
        if rule not in ("metaclip", "metaclip2"):
            raise ValueError(f"unknown rule {rule!r}: use metaclip or metaclip2")
        self.rule = rule
        self.lower_case = lower_case
        self.inputs = {"entries": str(entries)}
        self._matcher: EntryMatcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_matcher": None}

    def _build(self) -> EntryMatcher:
        path = self.inputs["entries"]
        entries = read_entries(path)
        if self.lower_case:
            upper = [entry for entry in entries if entry != entry.lower()]
            if upper:
                raise ValueError(
                    f"{len(upper)} entries of {path} hold upper-case letters, such as {upper[:5]}, "
                    "and never match with lower_case=true: build the list with it or set false"
                )
        return EntryMatcher(entries=entries, rule=self.rule)

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Raises ValueError for a caption that is not a string; ingest counts and drops those."""
        if self._matcher is None:
            self._matcher = self._build()
        captions = [sample["caption"] for sample in batch]
        for sample in batch:
            if not isinstance(sample["caption"], str):
                raise ValueError(
                    f"the caption of {sample['uid']} is {sample['caption']!r}, not a string"
                )
        if self.rule == "metaclip2":
            captions = [caption.strip() for caption in captions]
        if self.lower_case:
            captions = [caption.lower() for caption in captions]
        return [{"entries": ids} for ids in self._matcher.match(captions)]
