"""Annotator: which metadata entries a caption mentions (MetaCLIP, arXiv:2309.16671, sec. 3.2;
MetaCLIP 2, arXiv:2507.22062). The matching itself is `curation.metadata.matcher`.

Price: about half a million captions a second and core with rule 1 (benchmarks/results/matching.md).
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from curation.metadata.matcher import EntryMatcher, Rule, padded

__all__ = ["Entries", "EntryMatcher", "padded", "read_entries"]


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
        texts = self._texts([s["uid"] for s in batch], [s["caption"] for s in batch])
        return [{"entries": ids} for ids in self._load().match(texts)]

    def annotate_table(self, part: pa.Table) -> dict[str, pa.Array]:
        """The same answers for a table with uid and caption, as a column: no object per row."""
        texts = part["caption"]
        if texts.null_count or self.lower_case or self.rule == "metaclip2":
            texts = self._texts(part["uid"].to_pylist(), texts.to_pylist())
        return {"entries": self._load().match_lists(texts)}

    def _texts(self, uids: list[str], captions: list[Any]) -> list[str]:
        for uid, caption in zip(uids, captions, strict=True):
            if not isinstance(caption, str):
                raise ValueError(f"the caption of {uid} is {caption!r}, not a string")
        if self.rule == "metaclip2":
            captions = [caption.strip() for caption in captions]
        return [caption.lower() for caption in captions] if self.lower_case else captions

    def _load(self) -> EntryMatcher:
        if self._matcher is None:
            self._matcher = self._build()
        return self._matcher
