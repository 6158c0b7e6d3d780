"""What a Wikipedia dump says about a language's words: extracted text and page views, as files that
the user has.

Text: what an extractor made of the article dump, plain or one JSON object a line with "text" (both
outputs of WikiExtractor). Views: hourly page view files ("en Hot_dog 12 0": domain, title, views,
bytes), or "title<TAB>views". Any file may be .gz or .bz2.
"""

import bz2
import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)
_TAG = re.compile(r"<[^<>\n]+>")
_OPEN = {".gz": gzip.open, ".bz2": bz2.open}


def open_text(path: Path) -> IO[str]:
    """A text file, unpacked on the way if its name ends in .gz or .bz2. Raises ValueError if it
    does not exist.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    opener = _OPEN.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8", errors="replace", newline="\n")


def paragraphs(files: Iterable[Path]) -> Iterator[str]:
    """The lines of the articles, without markup tags. Raises ValueError naming file and line for
    JSON without a "text".
    """
    for path in files:
        with open_text(path) as lines:
            as_json = None
            for number, line in enumerate(lines, 1):
                if as_json is None and line.strip():
                    as_json = line.lstrip().startswith("{")
                text = _article(path, number, line) if as_json else line
                for paragraph in _TAG.sub(" ", text).split("\n"):
                    if paragraph.strip():
                        yield paragraph


def _article(path: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(
            f'{path} line {number}: need a JSON object with "text", as its first line has: '
            f"{line[:80]!r}"
        )
    return text


def page_views(
    files: Iterable[Path], *, language: str, min_hourly_views: int, mobile: bool
) -> Counter[str]:
    """Views of each title, underscores as spaces; titles with ":" (other name spaces) left out.

    language: the domain in hourly files ("en"; "zh_yue" is read as "zh-yue").
    min_hourly_views: lines with less are not counted. MetaCLIP: 50; MetaCLIP 2: 1.
    mobile: count "en.m" too. MetaCLIP: false; MetaCLIP 2: true.
    Lines that cannot be read are counted and left out. Raises ValueError for a file with more such
    lines than others.
    """
    domain = language.replace("_", "-")
    domains = {domain, f"{domain}.m"} if mobile else {domain}
    views: Counter[str] = Counter()
    for path in files:
        good = bad = 0
        with open_text(path) as lines:
            for line in lines:
                line = line.rstrip("\r\n")
                fields = [domain, *line.split("\t")] if "\t" in line else line.split(" ")[:3]
                if len(fields) != 3 or not fields[2].isdecimal():
                    bad += bool(line)
                    continue
                good += 1
                title, count = fields[1].replace("_", " ").strip(), int(fields[2])
                if fields[0] in domains and count >= min_hourly_views and ":" not in title:
                    views[title] += count
        if bad > good:
            raise ValueError(
                f'{path}: {bad} of {good + bad} lines are neither "domain title views bytes" nor '
                '"title<TAB>views"'
            )
        if bad:
            log.warning("%s: %d of %d lines cannot be read", path, bad, good + bad)
    return views
