"""COMMAND: build an entry list of WordNet's lemmas, a Wikipedia dump and the pool's own frequent
words and word pairs (MetaCLIP, arXiv:2309.16671, sec. 3.1; MetaCLIP 2, arXiv:2507.22062).

    python -m curation.metadata.build --captions rows.parquet ... --output entries.json

The order is MetaCLIP's: "0" to "99", WordNet, unigrams, bigrams, titles of Wikipedia; the pool's
unigrams and bigrams last. Within a source by falling count, PMI or views, then alphabetically (the
released code leaves it to Python's set). Same files and knobs = same file, byte for byte. N-grams
are cut exactly as matching cuts captions, so every one of them matches where it was counted.
"""

import argparse
import hashlib
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curation.metadata.knobs import WIKIPEDIA, EntryKnobs, WikipediaKnobs
from curation.metadata.ngrams import associated_bigrams, count_ngrams, frequent
from curation.metadata.wikipedia import open_text, page_views, paragraphs
from curation.metadata.wordnet import lemmas

FORMAT = "pairwright-entries-1"
_MAX_LENGTH = 256  # characters, as in MetaCLIP 2
_PUNCTUATION = frozenset(string.punctuation + "，。、；：？¿！“”‘’（）【】《》〈〉「」『』～—")


@dataclass(frozen=True, kw_only=True)
class WikipediaFiles:
    """A dump: files of text and of page views, either may be missing, and their knobs."""

    text: Sequence[Path] = ()
    page_views: Sequence[Path] = ()
    knobs: WikipediaKnobs = WIKIPEDIA["metaclip"]


@dataclass(frozen=True)
class _Source:
    """Candidates in order, and how many of them may be new; None: all."""

    candidates: Sequence[str]
    cap: int | None = None


def build(
    captions: Iterable[str],
    knobs: EntryKnobs | None = None,
    *,
    wikipedia: WikipediaFiles | None = None,
    more_lemmas: Sequence[str] = (),
) -> dict[str, Any]:
    """The entry list as written to disk: format, language, sources {name: number of new entries},
    knobs, sha256, entries.

    more_lemmas: a WordNet of another language; follows the English one, if that is asked for.
    sha256 is of the entries as compact UTF-8 JSON: it names the ids' meaning.
    """
    knobs = knobs or EntryKnobs()
    unigrams, bigrams = count_ngrams(captions, lower_case=knobs.lower_case)
    pairs = associated_bigrams(
        unigrams, bigrams, min_count=knobs.min_bigram_count, min_pmi=knobs.min_pmi
    )
    sources = {
        "numbers": _Source([str(number) for number in range(100)]),
        "wordnet": _Source([*(lemmas() if knobs.wordnet else []), *more_lemmas]),
        **(_wikipedia_sources(wikipedia, knobs) if wikipedia else {}),
        "unigrams": _Source(frequent(unigrams, min_count=knobs.min_unigram_count)),
        "bigrams": _Source(_written(pairs, knobs)),
    }
    entries: dict[str, None] = {}
    new = {name: _add(entries, source, knobs.max_entries) for name, source in sources.items()}
    text = json.dumps(list(entries), ensure_ascii=False, separators=(",", ":"))
    return {
        "format": FORMAT,
        "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "language": knobs.language,
        "sources": new,
        "knobs": asdict(knobs) | ({"wikipedia": asdict(wikipedia.knobs)} if wikipedia else {}),
        "entries": list(entries),
    }


def _add(entries: dict[str, None], source: _Source, max_entries: int | None) -> int:
    """Adds what is new and can be an entry, at most the source's cap; returns how many."""
    before = len(entries)
    stop = min(
        before + len(source.candidates) if source.cap is None else before + source.cap,
        before + len(source.candidates) if max_entries is None else max_entries,
    )
    for candidate in source.candidates:
        if len(entries) >= stop:
            break
        candidate = candidate.strip()
        if 0 < len(candidate) <= _MAX_LENGTH and not _PUNCTUATION.issuperset(candidate):
            entries[candidate] = None
    return len(entries) - before


def _wikipedia_sources(files: WikipediaFiles, knobs: EntryKnobs) -> dict[str, _Source]:
    wiki, capped = files.knobs, files.knobs.caps == "metaclip2"
    sources = {}
    if files.text:
        unigrams, bigrams = count_ngrams(paragraphs(files.text), lower_case=knobs.lower_case)
        words = frequent(unigrams, min_count=wiki.min_unigram_count)
        pairs = associated_bigrams(
            unigrams, bigrams, min_count=wiki.min_bigram_count, min_pmi=wiki.min_pmi
        )
        cap = min(251_465, len(unigrams) // 10) if capped else None
        sources["wikipedia_unigrams"] = _Source(words, cap)
        cap = 100_646 if capped else None
        sources["wikipedia_bigrams"] = _Source(_written(pairs, knobs), cap)
    if files.page_views:
        views = page_views(
            files.page_views,
            language=knobs.language,
            min_hourly_views=wiki.min_hourly_views,
            mobile=wiki.mobile,
        )
        cap = min(61_235, len(views) * 76 // 100) if capped else None
        titles = frequent(views, min_count=wiki.min_title_views)
        if knobs.lower_case:
            titles = [title.lower() for title in titles]
        sources["wikipedia_titles"] = _Source(titles, cap)
    return sources


def _written(pairs: list[str], knobs: EntryKnobs) -> list[str]:
    return [pair.replace(" ", "") for pair in pairs] if knobs.unspaced else pairs


def read_lemmas(path: Path) -> list[str]:
    """A WordNet of another language: a lemma a line, or the tab files of the Open Multilingual
    Wordnet ("offset<TAB>lang:lemma<TAB>lemma"). "_" is a space; "+", which marks a boundary there,
    goes. Sorted, distinct.
    """
    found = set()
    with open_text(path) as lines:
        for line in lines:
            columns = line.rstrip("\r\n").split("\t")
            if line.startswith("#") or (len(columns) > 2 and not columns[1].endswith("lemma")):
                continue
            found.add(columns[min(2, len(columns) - 1)].replace("_", " ").replace("+", "").strip())
    return sorted(found - {""})


def write(metadata: Mapping[str, Any], path: Path) -> None:
    """One entry a line, to a temporary name first."""
    head = {name: value for name, value in metadata.items() if name != "entries"}
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in metadata["entries"])
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "entries": [\n' + lines + "\n]}\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_captions(files: Iterable[Path], *, column: str) -> Iterator[str]:
    """Captions of Parquet files, in order, without nulls."""
    for file in files:
        if column not in pq.read_schema(file).names:
            raise ValueError(
                f"{file} has no column {column!r}, but {pq.read_schema(file).names}: set --column"
            )
        for batch in pq.ParquetFile(file).iter_batches(columns=[column]):
            yield from (caption for caption in batch.column(0).to_pylist() if caption is not None)


def _add_knobs(parser: argparse.ArgumentParser, knobs: type, prefix: str = "") -> None:
    """An option per knob; None: not given, so that the defaults stay in one place."""
    for field in fields(knobs):
        flag = f"--{prefix}{field.name}".replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, dest=prefix + field.name
            )
        else:
            kind = int if field.default is None else type(field.default)
            parser.add_argument(flag, type=kind, dest=prefix + field.name)


def _given(options: argparse.Namespace, knobs: type, prefix: str = "") -> dict[str, Any]:
    values = {field.name: getattr(options, prefix + field.name) for field in fields(knobs)}
    return {name: value for name, value in values.items() if value is not None}


def main() -> None:
    """Read the sources, build, write."""
    parser = argparse.ArgumentParser(
        description="Build the entry list of a pool. Knobs: curation/metadata/knobs.py"
    )
    add = parser.add_argument
    add("--output", type=Path, required=True)
    add("--captions", type=Path, nargs="+", default=[], help="Parquet files")
    add("--column", default="caption")
    add("--wikipedia-text", type=Path, nargs="+", default=[], help="plain or JSON lines, .gz, .bz2")
    add("--wikipedia-views", type=Path, nargs="+", default=[], help="page view files, .gz, .bz2")
    add(
        "--wikipedia-rule", choices=WIKIPEDIA, default="metaclip", help="whose values to begin with"
    )
    add("--lemmas", type=Path, nargs="+", default=[], help="another language's WordNet")
    _add_knobs(parser, EntryKnobs)
    _add_knobs(parser, WikipediaKnobs, "wikipedia_")
    options = parser.parse_args()
    given = _given(options, EntryKnobs)
    given.setdefault("wordnet", given.get("language", "en") == "en")
    knobs = EntryKnobs(**given)
    wikipedia = None
    if options.wikipedia_text or options.wikipedia_views:
        wikipedia = WikipediaFiles(
            text=options.wikipedia_text,
            page_views=options.wikipedia_views,
            knobs=replace(
                WIKIPEDIA[options.wikipedia_rule], **_given(options, WikipediaKnobs, "wikipedia_")
            ),
        )
    if not (options.captions or wikipedia or options.lemmas or knobs.wordnet):
        parser.error("no source: give --captions, --wikipedia-text, --wikipedia-views or --lemmas")
    metadata = build(
        read_captions(options.captions, column=options.column),
        knobs,
        wikipedia=wikipedia,
        more_lemmas=[lemma for path in options.lemmas for lemma in read_lemmas(path)],
    )
    write(metadata, options.output)
    print(f"{options.output}: {len(metadata['entries'])} entries, {metadata['sources']}")


if __name__ == "__main__":
    main()
