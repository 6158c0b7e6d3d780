"""The 147,306 lemmas of WordNet 3.0, shipped as a sorted gzipped list beside this file (licence:
WORDNET_LICENSE.txt).

To make the list again from the index.noun, index.verb, index.adj and index.adv files of WordNet 3.0
(Debian: wordnet-base):
    python -m curation.metadata.wordnet FOLDER
"""

import argparse
import gzip
from importlib import resources
from pathlib import Path

_NAME = "wordnet_lemmas.txt.gz"


def lemmas() -> list[str]:
    """All lemmas, lower case, words separated by spaces, in code point order."""
    packed = resources.files("curation.metadata").joinpath(_NAME).read_bytes()
    return gzip.decompress(packed).decode("ascii").splitlines()


def extract(folder: Path) -> list[str]:
    """The distinct lemmas of WordNet's index files, sorted; the licence lines at their heads begin
    with a space.
    """
    found: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"index.{part}").read_text(encoding="ascii").splitlines():
            if not line.startswith(" "):
                found.add(line.split(" ", 1)[0].replace("_", " "))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the shipped list of WordNet lemmas again.")
    parser.add_argument(
        "folder", type=Path, help="holds index.noun, index.verb, index.adj, index.adv"
    )
    text = "\n".join(extract(parser.parse_args().folder)) + "\n"
    # mtime 0: the same list gives the same bytes
    Path(__file__).with_name(_NAME).write_bytes(gzip.compress(text.encode("ascii"), 9, mtime=0))


if __name__ == "__main__":
    main()
