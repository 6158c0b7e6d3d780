"""Build an entry list: WordNet's lemmas and the pool's own frequent words and word pairs (MetaCLIP,
sec. 3.1).

The order is MetaCLIP's: "0" to "99", WordNet, unigrams, bigrams (its last source, Wikipedia titles
by page views, has no counterpart in a pool). Same captions and knobs = same file, byte for byte.
N-grams are cut exactly as matching cuts captions, so every one of them matches where it was
counted.

    python -m curation.metadata.build --captions rows.parquet ... --output entries.json
"""

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curation.metadata.spacing import spaced
from curation.metadata.wordnet import lemmas

FORMAT = "pairwright-entries-1"
_MAX_LENGTH = 256  # characters, as in MetaCLIP 2


@dataclass(frozen=True, kw_only=True)
class EntryKnobs:
    """What decides about the list.

    min_unigram_count: occurrences a word needs. MetaCLIP: 100 in English Wikipedia.
    min_bigram_count: occurrences a word pair needs; rare pairs have the highest PMI and mean the
        least.
    min_pmi: bits by which a pair is more frequent than by chance. MetaCLIP: 30, which only a corpus
        of 2^30 words can reach; a pool of W words has pairs up to log2(W).
    wordnet: false leaves the lemmas out.
    lower_case: lower-case the captions first; for matching with lower_case=true.
    """

    min_unigram_count: int = 5
    min_bigram_count: int = 5
    min_pmi: float = 5.0
    wordnet: bool = True
    lower_case: bool = False

    def __post_init__(self) -> None:
        for name in ("min_unigram_count", "min_bigram_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: need at least 1")


def build(captions: Iterable[str], knobs: EntryKnobs | None = None) -> dict[str, Any]:
    """The entry list as written to disk: format, entries, sources {name: number of new entries},
    knobs, sha256.

    sha256 is of the entries as compact UTF-8 JSON: it names the ids' meaning.
    """
    knobs = knobs or EntryKnobs()
    unigrams, bigrams = count_ngrams(captions, lower_case=knobs.lower_case)
    sources = {
        "numbers": [str(number) for number in range(100)],
        "wordnet": lemmas() if knobs.wordnet else [],
        "unigrams": frequent_unigrams(unigrams, min_count=knobs.min_unigram_count),
        "bigrams": associated_bigrams(
            unigrams, bigrams, min_count=knobs.min_bigram_count, min_pmi=knobs.min_pmi
        ),
    }
    entries: dict[str, None] = {}
    new: dict[str, int] = {}
    for name, candidates in sources.items():
        before = len(entries)
        entries.update(dict.fromkeys(entry for entry in candidates if len(entry) <= _MAX_LENGTH))
        new[name] = len(entries) - before
    text = json.dumps(list(entries), ensure_ascii=False, separators=(",", ":"))
    return {
        "format": FORMAT,
        "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "sources": new,
        "knobs": asdict(knobs),
        "entries": list(entries),
    }


def count_ngrams(
    captions: Iterable[str], *, lower_case: bool
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Occurrences of words, and of pairs of words with one space between them.

    A word is what stands between spaces in the spaced caption, begins and ends with a letter or
    digit.
    """
    unigrams: Counter[str] = Counter()
    bigrams: Counter[tuple[str, str]] = Counter()
    for caption in captions:
        tokens = spaced(caption.lower() if lower_case else caption).split(" ")
        words = [
            token if token and token[0].isalnum() and token[-1].isalnum() else None
            for token in tokens
        ]
        unigrams.update(word for word in words if word)
        bigrams.update((first, second) for first, second in pairwise(words) if first and second)
    return unigrams, bigrams


def frequent_unigrams(unigrams: Counter[str], *, min_count: int) -> list[str]:
    """Words by falling count, then alphabetically."""
    return sorted(
        (word for word, count in unigrams.items() if count >= min_count),
        key=lambda word: (-unigrams[word], word),
    )


def associated_bigrams(
    unigrams: Counter[str],
    bigrams: Counter[tuple[str, str]],
    *,
    min_count: int,
    min_pmi: float,
) -> list[str]:
    """Pairs "a b" by falling pointwise mutual information log2(n_ab * W / (n_a * n_b)), W words in
    all.
    """
    total = unigrams.total()
    scored = [
        (-math.log2(count * total / (unigrams[first] * unigrams[second])), f"{first} {second}")
        for (first, second), count in bigrams.items()
        if count >= min_count
    ]
    return [pair for negative_pmi, pair in sorted(scored) if -negative_pmi >= min_pmi]


def write(metadata: dict[str, Any], path: Path) -> None:
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


def main() -> None:
    """Read captions from Parquet files, build, write."""
    parser = argparse.ArgumentParser(description="Build the entry list of a pool.")
    parser.add_argument("--captions", type=Path, nargs="+", required=True, help="Parquet files")
    parser.add_argument("--column", default="caption")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--min-unigram-count", type=int, default=EntryKnobs.min_unigram_count)
    parser.add_argument("--min-bigram-count", type=int, default=EntryKnobs.min_bigram_count)
    parser.add_argument("--min-pmi", type=float, default=EntryKnobs.min_pmi)
    parser.add_argument("--no-wordnet", action="store_true")
    parser.add_argument("--lower-case", action="store_true")
    arguments = parser.parse_args()
    knobs = EntryKnobs(
        min_unigram_count=arguments.min_unigram_count,
        min_bigram_count=arguments.min_bigram_count,
        min_pmi=arguments.min_pmi,
        wordnet=not arguments.no_wordnet,
        lower_case=arguments.lower_case,
    )
    metadata = build(read_captions(arguments.captions, column=arguments.column), knobs)
    write(metadata, arguments.output)
    print(f"{arguments.output}: {len(metadata['entries'])} entries, {metadata['sources']}")


if __name__ == "__main__":
    main()
