"""How fast are captions matched against metadata entries: ours, and the pyahocorasick way of
MetaCLIP's repository.

    python benchmarks/matching.py --entries 120000 --entries 500000 --output FILE.md

Both run in one process, turn by turn, on the same captions; the best CPU time of each counts, and
the answers are compared on all captions. Inputs are made from the WordNet lemmas in
curation/metadata, with the caption statistics of dictionary glosses; same seed, same inputs. The
peer needs `pip install pyahocorasick`.
"""

import argparse
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curation.annotate.entries import EntryMatcher
from curation.metadata.wordnet import lemmas

# the commonest first; about a third are WordNet lemmas themselves
GLUE = ["the", "of", "a", "in", "and", "to", "or", "for", "with", "by", "an", "that", "from"]
GLUE += ["as", "which", "at", "his"]


def make_captions(count: int, seed: int) -> list[str]:
    """Sentences of 3 to 13 words: glue, lemmas of one and of several words, inflected lemmas.

    Lemmas and glue follow Zipf's law. 15 % are capitalised with a full stop, 5 % hold a line
    break, 5 % brackets, 3 % a comma and an exclamation mark: the shares of dictionary glosses.
    """
    draw = random.Random(seed)
    singles = [word for word in lemmas() if " " not in word and word.isalpha()]
    phrases = [word for word in lemmas() if " " in word]
    for kind in (singles, phrases):  # short words are the frequent ones
        kind.sort(key=lambda word: len(word) + draw.uniform(0, 40))
    kinds = (GLUE, singles, [f"{word}s" for word in singles], phrases)
    zipf = [list(accumulate(1 / (rank + 8) for rank in range(len(kind)))) for kind in kinds]
    captions = []
    for _ in range(count):
        words = []
        for kind in draw.choices(range(4), cum_weights=(47, 68, 96, 100), k=draw.randint(3, 13)):
            words += draw.choices(kinds[kind], cum_weights=zipf[kind])
        chance = draw.random()
        if chance < 0.15:
            text = " ".join(words).capitalize() + "."
        elif chance < 0.20:
            text = " ".join(words[:2]) + "\n" + " ".join(words[2:])
        elif chance < 0.25:
            text = " ".join(words[:1]) + " (" + " ".join(words[1:]) + ")"
        elif chance < 0.28:
            text = " ".join(words[:2]) + ", " + " ".join(words[2:]) + "!"
        else:
            text = " ".join(words)
        captions.append(text)
    return captions


def make_entries(count: int, captions: list[str], seed: int) -> list[str]:
    """ "0" to "99", WordNet lemmas (119,900, or fewer for a smaller count), then word pairs: the
    captions' own by frequency, then random ones.
    """
    draw = random.Random(seed)
    words = lemmas()
    chosen = sorted(draw.sample(words, min(count, 120_000) - 100))
    entries = dict.fromkeys([*map(str, range(100)), *chosen])
    if count > len(entries):
        pairs: Counter[str] = Counter()
        for caption in captions:
            pairs.update(f"{a} {b}" for a, b in pairwise(caption.split(" ")) if a and b)
        for pair in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
            if len(entries) == count:
                break
            if not set(pair) & set(",.;:?!`\t\n\r"):
                entries[pair] = None
        while len(entries) < count:
            entries[" ".join(draw.choices(words, k=2))] = None
    return list(entries)


class Peer:
    """MetaCLIP's own fast way, from its description: pyahocorasick over the padded entries with
    (id, entry) as payload, all matches of the spaced caption into a set, the set into a list.
    """

    def __init__(self, entries: list[str]):
        try:
            import ahocorasick
        except ImportError:
            sys.exit("the peer is missing: pip install pyahocorasick")
        self.automaton = ahocorasick.Automaton()
        for number, entry in enumerate(entries):
            self.automaton.add_word(f" {entry} ", (number, entry))
        self.automaton.make_automaton()

    def match(self, captions: list[str]) -> list[list[int]]:
        """Distinct ids per caption, unordered."""
        found = []
        for caption in captions:
            text = f" {caption} "
            for mark in ",.;:?!`":
                text = text.replace(mark, f" {mark} ")
            for white in "\t\n\r":
                text = text.replace(white, " ")
            ids = set()
            for _, (number, _) in self.automaton.iter(text):
                ids.add(number)
            found.append(list(ids))
        return found


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds, wall seconds, answer), garbage collection off."""
    gc.collect()
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    answer = function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.enable()
    return cpu, wall, answer


def worker(
    rank: int, workers: int, entries: list[str], captions: list[str], repetitions: int, gate, queue
) -> None:
    """One of the processes side by side: matches its share of the captions, all starting at once;
    sends (start, stop, CPU seconds) of each repetition, on the clock that processes share.
    """
    matcher, share = EntryMatcher(entries=entries), captions[rank::workers]
    matcher.match(share[:1000])
    times = []
    for _ in range(repetitions):
        gate.wait()
        start = time.monotonic()
        cpu, _, _ = timed(lambda: matcher.match(share))
        times.append((start, time.monotonic(), cpu))
    queue.put(times)


def side_by_side(
    workers: int, entries: list[str], captions: list[str], repetitions: int
) -> tuple[float, float]:
    """(CPU seconds of the slowest process, wall seconds from the first start to the last stop) in
    which `workers` processes match all captions between them; the best repetition of each.
    """
    context = multiprocessing.get_context("spawn")
    gate, queue = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(
            target=worker, args=(rank, workers, entries, captions, repetitions, gate, queue)
        )
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    times = np.array([queue.get() for _ in processes])  # (workers, repetitions, 3)
    for process in processes:
        process.join()
    wall = times[:, :, 1].max(0) - times[:, :, 0].min(0)
    return float(times[:, :, 2].max(0).min()), float(wall.min())


def measure(num_entries: int, captions: list[str], repetitions: int, workers: int) -> list[str]:
    """Rows of the table for one size of the entry list; prints them as they come."""
    entries = make_entries(num_entries, captions, seed=0)
    peer_build, _, peer = timed(lambda: Peer(entries))
    build, _, matcher = timed(lambda: EntryMatcher(entries=entries))
    found = matcher.match(captions)
    different = sum(sorted(a) != b for a, b in zip(peer.match(captions), found, strict=True))
    matches = sum(map(len, found)) / len(captions)
    unmatched = sum(not ids for ids in found) / len(captions)
    print(
        f"{len(entries)} entries, {len(captions)} captions, {matches:.2f} matches a caption, "
        f"{unmatched:.1%} without, {different} captions differ"
    )
    if different:
        sys.exit("the answers differ: no timing means anything")
    ways = {
        "MetaCLIP's pyahocorasick way": lambda: peer.match(captions),
        "ours, `match` (lists)": lambda: matcher.match(captions),
        "ours, `match_flat` (arrays)": lambda: matcher.match_flat(captions),
    }
    best = dict.fromkeys(ways, (float("inf"), float("inf")))
    for _ in range(repetitions):
        for name, way in ways.items():
            cpu, wall, _ = timed(way)
            best[name] = (min(best[name][0], cpu), min(best[name][1], wall))
    best[f"ours, `match`, {workers} processes"] = side_by_side(
        workers, entries, captions, 3 * repetitions
    )
    reference = best[next(iter(ways))]
    lines = []
    for name, times in best.items():
        columns = [f"{len(entries):,}", name]
        for seconds, slow in zip(times, reference, strict=True):
            columns += [f"{len(captions) / seconds:,.0f}", f"{slow / seconds:.2f}x"]
        columns.append(f"{build if name.startswith('ours') else peer_build:.1f} s")
        lines.append("| " + " | ".join(columns) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure for each size of the entry list, print, write."""
    parser = argparse.ArgumentParser(description="Matching captions against metadata entries.")
    parser.add_argument("--entries", type=int, action="append", help="default: 120000 500000")
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--date", default="", help="written into the page")
    parser.add_argument("--output", type=Path, help="Markdown file")
    options = parser.parse_args()
    captions = make_captions(options.captions, seed=0)
    words = sum(len(caption.split()) for caption in captions) / len(captions)
    characters = sum(map(len, captions)) / len(captions)
    lines = []
    for num_entries in options.entries or [120_000, 500_000]:
        lines += measure(num_entries, captions, options.repetitions, options.workers)
    if options.output:
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("numpy", "pyarrow", "pyahocorasick")
        )
        options.output.write_text(
            PAGE.format(
                date=options.date,
                load=os.getloadavg()[0],
                versions=f"Python {platform.python_version()}, {versions}",
                captions=f"{len(captions):,}",
                text=f"{words:.1f} words and {characters:.0f} characters",
                repetitions=options.repetitions,
                command=" ".join(["python", *sys.argv]),
                table="\n".join(lines),
            ),
            encoding="utf-8",
        )


PAGE = """# Matching captions against metadata entries

{date}. 2 cores of a shared x86-64 server, load average {load:.0f} at the end of the run.
{versions}.
`{command}`

{captions} captions made from WordNet's lemmas, {text} on average; entries are "0" to "99", WordNet
lemmas and, above 120,000, word pairs. Each way answered all captions and the answers were the same,
caption by caption. Rates are captions a second, the best of {repetitions} repetitions that took
turns in one process; ratios are to the first way. CPU time is the fairer of the two: others use the
machine too. With several processes (three times the repetitions) it is the CPU time of the slowest
one, and the wall time from the first start to the last stop. Spacing the captions is part of the
time, building is not.

| entries | way | by CPU time | ratio | by wall time | ratio | build |
|---|---|---|---|---|---|---|
{table}
"""

if __name__ == "__main__":
    main()
