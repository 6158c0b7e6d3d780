"""COMMAND: the phrases that a pool hangs on its captions ("free download"), found in the captions.

    python -m curation.metadata.boilerplate --captions rows.parquet ... --output boilerplate.json

A final run of 2 to 5 words is boilerplate when three things hold, letters' case aside:
1. it follows many different beginnings (`min_beginnings`);
2. it also stands alone as a whole caption (`min_alone`): it says the same of any picture, and where
   it begins is decided ("price shipping worldwide" never stands alone, "best price ..." does);
3. a fair share of the beginnings are captions of the pool just as they stand (`min_complete`): what
   comes before it was complete. "Cook: medium skin tone" has many beginnings too, but nobody writes
   "cook:", and in "red office building" nobody writes "red".

Price: 0.2 s for 100,000 captions; memory grows with the distinct captions, so give a part
of a large pool. In a pool whose captions never occur twice 3 finds nothing: the list stays empty.
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curation.metadata.build import read_captions
from pipeline.shards import write_json

FORMAT = "pairwright-boilerplate-1"
WORDS = range(2, 6)  # of a phrase: one word is as likely a noun, six a sentence


@dataclass(frozen=True, kw_only=True)
class BoilerplateKnobs:
    """What decides about the list; see the module. min_complete: a fraction of the beginnings."""

    min_beginnings: int = 50
    min_alone: int = 2
    min_complete: float = 0.2

    def __post_init__(self) -> None:
        if self.min_beginnings < 1 or self.min_alone < 1:
            raise ValueError(
                f"min_beginnings {self.min_beginnings}, min_alone {self.min_alone}: at least 1"
            )
        if not 0 <= self.min_complete <= 1:
            raise ValueError(f"min_complete {self.min_complete}: a fraction in [0, 1]")


def find(captions: Iterable[str], knobs: BoilerplateKnobs | None = None) -> dict[str, Any]:
    """The list as written to disk: format, knobs, sha256, and phrases with their evidence.

    phrases: [{phrase (lower case, single spaces), beginnings, alone, complete}], most beginnings
    first. The order of the captions changes nothing.
    """
    knobs = knobs or BoilerplateKnobs()
    whole = Counter(" ".join(caption.lower().split()) for caption in captions)
    beginnings: dict[str, set[str]] = defaultdict(set)
    for caption in whole:
        words = caption.split(" ")
        for count in WORDS:
            phrase = " ".join(words[-count:])
            # looked up first: of most runs the beginnings need no memory
            if len(words) > count and whole[phrase] >= knobs.min_alone:
                beginnings[phrase].add(" ".join(words[:-count]))
    found = []
    for phrase, before in beginnings.items():
        complete = sum(beginning in whole for beginning in before) / len(before)
        if len(before) >= knobs.min_beginnings and complete >= knobs.min_complete:
            evidence = {"beginnings": len(before), "alone": whole[phrase]}
            found.append({"phrase": phrase, **evidence, "complete": round(complete, 4)})
    found.sort(key=lambda entry: (-entry["beginnings"], entry["phrase"]))
    text = json.dumps([entry["phrase"] for entry in found], ensure_ascii=False)
    return {
        "format": FORMAT,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "knobs": asdict(knobs),
        "phrases": found,
    }


def read_phrases(path: str | Path) -> list[str]:
    """The phrases of a list that this command wrote, or of a plain JSON list of strings."""
    if not Path(path).is_file():
        raise ValueError(
            f"phrase list {path} does not exist: make it with `python -m "
            "curation.metadata.boilerplate --captions FILES --output FILE`"
        )
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    entries = content.get("phrases") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds neither a list of strings nor an object with 'phrases'")
    phrases = [entry["phrase"] if isinstance(entry, dict) else entry for entry in entries]
    wrong = [p for p in phrases if not isinstance(p, str) or not p.split()]
    if wrong:
        raise ValueError(f"{path}: {wrong[:3]} are empty or no strings: remove them")
    return phrases


def main() -> None:
    """Read captions from Parquet files, find, write."""
    knobs = BoilerplateKnobs
    parser = argparse.ArgumentParser(description="Find the boilerplate phrases of a pool.")
    parser.add_argument("--captions", type=Path, nargs="+", required=True, help="Parquet files")
    parser.add_argument("--column", default="caption")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--min-beginnings", type=int, default=knobs.min_beginnings)
    parser.add_argument("--min-alone", type=int, default=knobs.min_alone)
    parser.add_argument("--min-complete", type=float, default=knobs.min_complete)
    arguments = parser.parse_args()
    found = find(
        read_captions(arguments.captions, column=arguments.column),
        BoilerplateKnobs(
            min_beginnings=arguments.min_beginnings,
            min_alone=arguments.min_alone,
            min_complete=arguments.min_complete,
        ),
    )
    write_json(arguments.output, found)
    print(f"{arguments.output}: {[entry['phrase'] for entry in found['phrases']]}")


if __name__ == "__main__":
    main()
