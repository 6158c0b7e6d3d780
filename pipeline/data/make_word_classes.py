"""Make the lexicon of pipeline.data.word_classes again, from the files of WordNet 3.0 (Debian:
wordnet-base for *.exc, wordnet-sense-index for index.sense):

python -m pipeline.data.make_word_classes FOLDER

A word may be a form of several lemmas. WordNet counts tagged lemmas, not spellings: a spelling
scores all of its lemma's occurrences where it is the lemma ("building", noun), and an even share of
them where it is another form ("building" of "build"). The highest score wins, a noun on equal
scores.
"""

import argparse
import gzip
from collections import defaultdict
from pathlib import Path

from pipeline.data.word_classes import ADJECTIVE, LEXICON, NOUN, OTHER, VERB
from pipeline.shards import write_atomically

# WordNet's number of a part of speech; 5 are adjectives that stand around another
CLASS_OF_PART = {1: NOUN, 2: VERB, 3: ADJECTIVE, 4: OTHER, 5: ADJECTIVE}
EXCEPTIONS = {"noun.exc": NOUN, "verb.exc": VERB, "adj.exc": ADJECTIVE, "adv.exc": OTHER}
# Closed classes, of which WordNet knows none; it knows "a" as a letter and "in" as an inch. The
# modal verbs are among them, as in the tag sets that CLIPA's code uses.
FUNCTION_WORDS = """
a an the this that these those each every either neither both all any some no none such another
other much many more most few fewer less least several enough
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it
its itself we us our ours ourselves they them their theirs themselves who whom whose which what
whoever whatever whichever someone somebody something anyone anybody anything everyone everybody
everything nobody nothing one ones oneself
about above across after against along alongside amid amidst among amongst around as at atop before
behind below beneath beside besides between beyond by despite down during except for from in inside
into like minus near next of off on onto opposite out outside over past per plus since than through
throughout till to toward towards under underneath unlike until unto up upon versus via vs with
within without
and but or nor so yet if unless although though because while whereas whether when whenever where
wherever why how
can could may might must shall should will would ought cannot
not never there here then now too also just only very quite rather almost
's 't 're 've 'm 'll 'd d ll m re s t ve don doesn didn isn aren wasn weren won wouldn couldn
shouldn hasn haven hadn ain
"""


def lemma_counts(folder: Path) -> dict[tuple[str, int], int]:
    """(lemma, class) -> tagged occurrences, of lemmas that are one run of letters.

    Other spellings come apart before they meet the vocabulary.
    """
    found: dict[tuple[str, int], int] = defaultdict(int)
    for line in (folder / "index.sense").read_text(encoding="ascii").splitlines():
        key, _, _, count = line.split(" ")
        lemma, _, rest = key.partition("%")
        if lemma.isalpha():
            found[lemma, CLASS_OF_PART[int(rest[0])]] += int(count)
    return found


def irregular(folder: Path) -> dict[tuple[str, int], list[str]]:
    """(lemma, class) -> its irregular forms."""
    found = defaultdict(list)
    for name, kind in EXCEPTIONS.items():
        for line in (folder / name).read_text(encoding="ascii").splitlines():
            form, *lemmas = line.split(" ")
            if form.isalpha():
                for lemma in lemmas:
                    found[lemma, kind].append(form)
    return found


def forms(lemma: str, kind: int, known: list[str]) -> set[str]:
    """All spellings of a lemma; `known` are its irregular ones, which stand in for regular ones."""
    stem = lemma[:-1] if lemma[-1] == "e" else lemma
    changed = lemma[:-1] + "i" if lemma[-1] == "y" and lemma[-2:-1] not in [*"aeiou"] else None
    found = {lemma, *known}
    if kind in (NOUN, VERB):
        hisses = lemma.endswith(("s", "x", "z", "ch", "sh")) or changed
        found.add(f"{changed or lemma}{'es' if hisses else 's'}")
    if kind == VERB:
        if not any(form.endswith("ing") for form in known):
            kept_e = lemma.endswith(("ee", "oe", "ye"))
            found.add(f"{lemma if kept_e else stem}ing")
        if all(form.endswith("ing") for form in known):
            found.add(f"{changed or stem}ed")
    # Long adjectives have no such forms. "Happier", "larger" and "narrower" have six letters
    # before the ending at most.
    if kind == ADJECTIVE and not known and len(lemma) <= 6:
        found |= {f"{changed or stem}er", f"{changed or stem}est"}
    return found


def classes(folder: Path) -> dict[str, int]:
    """Every word that is mostly no noun -> its class."""
    scores: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    exceptions = irregular(folder)
    for (lemma, kind), count in lemma_counts(folder).items():
        spellings = forms(lemma, kind, exceptions.get((lemma, kind), []))
        for spelling in spellings:
            share = 1 if spelling == lemma else len(spellings)
            scores[spelling][kind] += count / share
    best = {
        word: min(by_class, key=lambda kind: (-by_class[kind], kind))
        for word, by_class in scores.items()
    }
    best |= dict.fromkeys(FUNCTION_WORDS.split(), OTHER)
    return {word: best[word] for word in sorted(best) if best[word] != NOUN}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the shipped lexicon of word classes again.")
    parser.add_argument("folder", type=Path, help="holds index.sense and the four *.exc files")
    found = classes(parser.parse_args().folder)
    text = "".join(f"{word} {kind}\n" for word, kind in found.items())
    # mtime 0: the same lexicon gives the same bytes
    write_atomically(LEXICON, gzip.compress(text.encode("ascii"), 9, mtime=0))


if __name__ == "__main__":
    main()
