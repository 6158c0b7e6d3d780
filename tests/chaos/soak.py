"""Many faults to many runs: `make chaos`, or `python -m tests.chaos.soak --faults 100`.

Prints a line a run, and a table of all: faults injected and survived, pairs lost and repeated,
seconds lost. --page writes the table between the page's markers.
"""

import argparse
import contextlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos.disturbed import Undisturbed, Verdict, disturb, small_disk
from tests.chaos.faults import ALL, SLOW, Fault
from tests.chaos.lives import Run, make_data

MARK, END = "<!-- table: soak -->", "<!-- end -->"
OF_A_RUN = 4
Job = tuple[int, int, tuple[type[Fault], ...]]  # processes, workers, kinds


def make_all_data(folder: Path) -> Path:
    """The pairs of every run, and `other`, with which a fault replaces them."""
    make_data(folder / "other", first=10_000)
    return make_data(folder)


def packs(
    kinds: Sequence[type[Fault]], processes: int, draw: random.Random
) -> list[tuple[tuple[type[Fault], ...], int]]:
    """(kinds, loader workers) of runs, each kind that can happen to so many processes once."""
    left = [kind for kind in kinds if processes in kind.processes]
    draw.shuffle(left)
    left.sort(key=lambda kind: kind.workers == (2,))  # those that want workers together
    found = []
    for start in range(0, len(left), OF_A_RUN):
        chosen = tuple(left[start : start + OF_A_RUN])
        common = set.intersection(*(set(kind.workers) for kind in chosen))
        found.append((chosen, min(common)))
    return found


def run_of(
    data: Path, place: Path, processes: int, workers: int, *, runs_dir: Path | None = None
) -> Run:
    """A run of its own, not yet started."""
    return Run(place, data, processes=processes, workers=workers, runs_dir=runs_dir)


@contextlib.contextmanager
def small_disk_or_none(kinds: Sequence[type[Fault]], folder: Path) -> Iterator[Path | None]:
    """Where the runs of these faults are kept, if any of them needs a place of its own."""
    if not any(kind.needs_small_disk for kind in kinds):
        yield None
        return
    with small_disk(folder) as disk:
        yield disk


def can_mount(folder: Path) -> bool:
    """Whether a file system of one's own can be had: root, and leave to mount."""
    try:
        with small_disk(folder):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def planned(faults: int, kinds: Sequence[type[Fault]], draw: random.Random) -> list[Job]:
    """Runs that hold at least so many faults, all kinds equally often as far as they go."""
    jobs: list[Job] = []
    while sum(len(chosen) for _, _, chosen in jobs) < faults:
        for processes in (1, 2):
            jobs += [(processes, workers, c) for c, workers in packs(kinds, processes, draw)]
    return jobs


def work(data: Path, place: Path, job: Job, seed: int, whole: Undisturbed) -> Verdict:
    """One run and what became of it."""
    processes, workers, kinds = job
    draw = random.Random(seed)
    with small_disk_or_none(kinds, place / "disk") as runs_dir:
        run = run_of(data, place / "run", processes, workers, runs_dir=runs_dir)
        return disturb(run, [kind(draw) for kind in kinds], draw, whole)


def table(verdicts: Sequence[Verdict], kinds: Sequence[type[Fault]]) -> str:
    """A row a kind of fault, and the sum."""
    lines = [
        "| fault | what it is | injected | survived | pairs lost or repeated | seconds lost |",
        "|---|---|---|---|---|---|",
    ]
    totals = [0, 0, 0]
    for kind in kinds:
        found = [(v, one) for v in verdicts for one in v.struck if one.kind == kind.__name__]
        if not found:
            continue
        survived = sum(verdict.good() for verdict, _ in found)
        wrong = sum(verdict.lost + verdict.repeated for verdict, _ in found)
        seconds = [one.seconds for _, one in found]
        what = " ".join((kind.__doc__ or "").split())
        span = f"{statistics.median(seconds):.0f} (up to {max(seconds):.0f})"
        lines.append(f"| {kind.__name__} | {what} | {len(found)} | {survived} | {wrong} | {span} |")
        totals = [a + b for a, b in zip(totals, (len(found), survived, wrong), strict=True)]
    lines.append(f"| **all** | | **{totals[0]}** | **{totals[1]}** | **{totals[2]}** | |")
    return "\n".join(lines)


def summary(verdicts: Sequence[Verdict], seed: int) -> str:
    """What was run, in one sentence."""
    exact = sum(v.same_losses and v.same_weights for v in verdicts)
    return (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, seed {seed}: "
        f"{len(verdicts)} runs of 20 steps, {sum(v.lives for v in verdicts)} starts; in {exact} of "
        f"them every loss and every weight is the undisturbed run's, bit for bit."
    )


def main() -> None:
    """Parse, plan, disturb, print; exit code 1 when a run was not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--kinds", nargs="+", help="names of faults; default: all")
    parser.add_argument("--slow", action="store_true", help="W&B without a server as well")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    kinds = [*ALL, *(SLOW if options.slow else ())]
    kinds = [k for k in kinds if not options.kinds or k.__name__ in options.kinds]
    draw = random.Random(options.seed)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        place = Path(folder)
        if not can_mount(place / "trial"):
            print("left out, they need root: FullDisk")
            kinds = [kind for kind in kinds if not kind.needs_small_disk]
        data = make_all_data(place / "data")
        whole = {n: Undisturbed(run_of(data, place / f"whole-{n}", n, 0)) for n in (1, 2)}
        jobs = planned(options.faults, kinds, draw)

        def one(number: int) -> Verdict:
            processes, workers, _ = jobs[number]
            at, seed = place / f"job-{number}", 1000 * options.seed + number
            verdict = work(data, at, jobs[number], seed, whole[processes])
            names = ", ".join(f"{s.kind} at {s.at} ({s.seconds:.0f} s)" for s in verdict.struck)
            said = "ok" if verdict.good() else f"WRONG {verdict}"
            of = f"{processes} processes, {workers} workers"
            print(f"{number + 1}/{len(jobs)}: {of}: {names}: {said}")
            sys.stdout.flush()
            return verdict

        with ThreadPoolExecutor(options.lanes) as pool:
            futures = [pool.submit(one, number) for number in range(len(jobs))]
            for number, future in enumerate(futures):
                try:
                    verdicts.append(future.result())
                except AssertionError as error:
                    chosen = ", ".join(kind.__name__ for kind in jobs[number][2])
                    print(f"{number + 1}/{len(jobs)}: FAILED, {chosen}: {error}", flush=True)
    text = f"{summary(verdicts, options.seed)}\n\n{table(verdicts, kinds)}"
    print(text)
    if options.page:
        before, _, rest = options.page.read_text().partition(MARK)
        after = rest.partition(END)[2]
        options.page.write_text(f"{before}{MARK}\n{text}\n{END}{after}")
    if len(verdicts) < len(jobs) or not all(verdict.good() for verdict in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
