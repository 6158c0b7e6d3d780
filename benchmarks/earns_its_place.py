"""Does each curation step earn its place? The same small training on the pool with and without it.

    python benchmarks/earns_its_place.py --out runs/earns --lanes 2 --page docs/results.md

One model per arm and seed, all with the same number of pairs seen; docs/results.md says what the
arms are and which figure decides. Killed, or run again, it goes on where it was. Figures go to
OUT/figures.json; --page writes the tables between the page's markers, from those figures alone.

An arm's command lines can be extended, and the arm that needs captions is run once it gets some:

    --curate "recaptioned=dataset=raw +annotate@annotate.NAME=NAME ..." --train "recaptioned=..."
"""

import argparse
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs without an installation, from anywhere

from benchmarks.earns_its_place_tables import COMPARISONS, fill, table  # noqa: E402
from pipeline.shards import read_manifest, write_json  # noqa: E402

BATCH = 256  # recipe=emoji
PROXY_SAMPLES = 204_800


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a model is trained on: overrides of `python -m curation.run` and of pipeline.train.

    {entries} and {proxy} stand for the entry list and the run that scores the pool. draws: the
    dataset is another one for each seed, so that its luck is part of the spread. planted: of the
    copy of the pool with captions' words written on 30 % of the images (plant_text.py).
    """

    curate: tuple[str, ...]
    train: tuple[str, ...] = ()
    draws: bool = False
    planted: bool = False


PARROT = (
    "dataset=raw",
    "+annotate@annotate.text_spotting=text_spotting",
    "+select@select.parrot=parrot_rate",
    "select.parrot.max_concurrent_rate=0",
    "order=[parrot]",
)
ARMS = {
    "raw": Arm(curate=("dataset=raw",)),
    "balanced": Arm(
        curate=(
            "dataset=raw",
            "+annotate@annotate.entries=entries",
            "annotate.entries.entries={entries}",
            "annotate.entries.lower_case=true",
            "+select@select.balance=balance",
            "select.balance.max_pairs_per_entry=20",
            "select.balance.tail_fraction=null",
            "select.balance.drop_unmatched=false",
            "order=[balance]",
        )
    ),
    "parrot": Arm(curate=PARROT),
    "planted": Arm(curate=("dataset=raw",), planted=True),
    "planted_parrot": Arm(curate=PARROT, planted=True),
    "no_text": Arm(
        curate=(
            "dataset=raw",
            "+annotate@annotate.text_spotting=text_spotting",
            "+select@select.parrot=parrot_no_text",
            "order=[parrot]",
        )
    ),
    "covariance": Arm(
        curate=(
            "dataset=raw",
            "+annotate@annotate.embed=embed",
            "annotate.embed.run={proxy}",
            "+select@select.covariance=covariance",
            "select.covariance.fraction=0.3",
            "order=[covariance]",
        )
    ),
    "random": Arm(
        curate=(
            "dataset=raw",
            "+select@select.random_subset=random_subset",
            "select.random_subset.fraction=0.3",
            "order=[random_subset]",
        ),
        draws=True,
    ),
    "recaptioned": Arm(curate=(), train=("captions@data.captions=mix",)),
}


class Bench:
    """The jobs of one folder: each runs once, and says so in OUT/done/JOB.json."""

    def __init__(self, options: argparse.Namespace, arms: dict[str, Arm]) -> None:
        self.options, self.arms = options, arms
        self.out: Path = options.out.resolve()
        self.tokenizer = str((options.tokenizer or self.out / "tokenizer").resolve())
        self.proxy = str((options.proxy or self.out / "runs" / "proxy").resolve())

    def job(self, name: str, module: str, *arguments: str) -> None:
        """`python -m module arguments`, unless it is done. Raises RuntimeError when it fails.

        Raises ValueError when a job of this name was done with another command line.
        """
        done, record = self.out / "done" / f"{name}.json", {"arguments": [module, *arguments]}
        if done.exists():
            before = json.loads(done.read_text())["arguments"]
            if before != record["arguments"]:
                changed = sorted(set(before) ^ set(record["arguments"]))
                raise ValueError(f"{done} is of another command ({changed}): give a new --out")
            return
        log, start = self.out / "logs" / f"{name}.log", time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        # one thread always: sums depend on the number of threads, and lanes must not change figures
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        with open(log, "wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise RuntimeError(f"{name} failed with {process.returncode}, {log} ends:\n{tail}")
        record["seconds"] = round(time.monotonic() - start, 1)
        # of the process and those it waited for: curation's worker processes are not in it
        record["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
        write_json(done, record)
        print(f"{name}: {record['seconds']} s", flush=True)

    def shards(self, arm: str, seed: int) -> Path:
        """The dataset of an arm."""
        return self.out / "shards" / (f"{arm}-{seed}" if ARMS[arm].draws else arm)

    def make_dataset(self, arm: str, seed: int) -> None:
        """Annotate, select, pack; the annotations are shared by all arms."""
        shards, pool, cache = self.shards(arm, seed), self.options.pool.resolve(), "cache"
        if ARMS[arm].planted:
            source, pool, cache = pool, self.out / "pool-planted", "cache-planted"
            self.job("plant", "benchmarks.plant_text", "--pool", str(source), "--out", str(pool))
        known = {"entries": self.out / "entries.json", "proxy": self.proxy}
        self.job(
            f"shards-{shards.name}",
            "curation.run",
            *(text.format(**known) for text in self.arms[arm].curate),
            f"pool={pool}",
            f"out={shards}",
            f"cache={self.out / cache}",
            *([f"seed={seed}"] if ARMS[arm].draws else []),
        )

    def prepare(self) -> None:
        """Raw shards, vocabulary, entry list, proxy, and the dataset of each arm."""
        self.make_dataset("raw", 0)
        raw = self.shards("raw", 0)
        if not self.options.tokenizer:
            self.job(
                "tokenizer",
                "pipeline.data.train_tokenizer",
                *("--shards", str(raw), "--vocab-size", "3000", "--out", self.tokenizer),
            )
        parquet = sorted(map(str, raw.glob("shard-*.parquet")))
        entries = ["--lower-case", "--output", str(self.out / "entries.json")]
        self.job("entries", "curation.metadata.build", *entries, "--captions", *parquet)
        if not self.options.proxy and "covariance" in self.arms:
            self.train("proxy", raw, 0, PROXY_SAMPLES, ())
        for arm in self.arms:
            for seed in self.options.seeds:
                self.make_dataset(arm, seed)

    def train(
        self, run: str, shards: Path, seed: int, samples: int, overrides: tuple[str, ...]
    ) -> None:
        """One model."""
        self.job(
            f"train-{run}",
            "pipeline.train",
            "recipe=emoji",
            f"name={run}",
            f"runs_dir={self.out / 'runs'}",
            f"data.shards={shards}",
            "data.workers=0",
            "tracking=file",
            f"seed={seed}",
            f"tokenizer.path={self.tokenizer}",
            f"samples_seen={samples}",
            f"schedule.warmup_samples={samples // 10}",
            *overrides,
        )

    def train_and_evaluate(self, arm: str, seed: int) -> None:
        """One model and its numbers."""
        run, shards = f"{arm}-seed{seed}", self.shards(arm, seed)
        self.train(run, shards, seed, self.options.samples_seen, self.arms[arm].train)
        self.job(
            f"evaluate-{run}",
            "pipeline.evaluate",
            f"run={self.out / 'runs' / run}",
            "eval=earns_its_place",
            f"eval.by_frequency.counts={self.shards('raw', 0)}",
        )

    def figures(self) -> dict[str, Any]:
        """What the folder holds, of all arms: pairs and drops, and the numbers of each seed."""
        arms: dict[str, Any] = {}
        for arm in ARMS:
            found: dict[str, dict[str, float]] = {}
            for done in sorted((self.out / "done").glob(f"evaluate-{arm}-seed*.json")):
                run = done.stem.removeprefix("evaluate-")
                tasks = sorted((self.out / "runs" / run / "eval").glob("*.json"))
                metrics = [json.loads(path.read_text())["metrics"] for path in tasks]
                found[run.rpartition("seed")[2]] = {k: v for m in metrics for k, v in m.items()}
            if found:
                steps = read_manifest(self.shards(arm, int(next(iter(found)))))["steps"]
                dropped = {
                    f"{step['name']}/{reason}": count
                    for step in steps
                    for reason, count in step["dropped"].items()
                }
                arms[arm] = {"pairs": steps[-1]["kept"], "dropped": dropped, "seeds": found}
        return {"samples_seen": self.options.samples_seen, "arms": arms}


def run_lanes(bench: Bench, jobs: list[tuple[str, int]], lanes: int) -> None:
    """All trainings, `lanes` at a time; with several, each lane stays on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= lanes <= len(cores):
        raise ValueError(f"--lanes {lanes}: there are {len(cores)} cores")
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failures: list[Exception] = []

    def lane(core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread; its processes inherit it
        while not failures:
            try:
                bench.train_and_evaluate(*waiting.get_nowait())
            except queue.Empty:
                return
            except (RuntimeError, ValueError, OSError) as error:
                failures.append(error)

    threads = [
        threading.Thread(target=lane, args=(cores[number] if lanes > 1 else None,))
        for number in range(lanes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def chosen_arms(options: argparse.Namespace) -> dict[str, Arm]:
    """The arms of the wanted comparisons, with the overrides of the command line."""
    arms = dict(ARMS)
    for field in ("curate", "train"):
        for given in getattr(options, field):
            name, _, overrides = given.partition("=")
            if name not in arms:
                raise ValueError(f"--{field} {given!r}: arms are {', '.join(arms)}")
            more = (*getattr(arms[name], field), *shlex.split(overrides))
            arms[name] = replace(arms[name], **{field: more})
    wanted = options.comparisons or [n for n, c in COMPARISONS.items() if arms[c.arm].curate]
    names = {"raw", *(n for c in wanted for n in (COMPARISONS[c].base, COMPARISONS[c].arm))}
    empty = [name for name in names if not arms[name].curate]
    if empty:
        raise ValueError(f"{empty} has no dataset: give --curate '{empty[0]}=dataset=... ...'")
    return {name: arm for name, arm in arms.items() if name in names}


def main() -> None:
    """Parse, prepare, train, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=Path, default=ROOT / "examples/emoji/pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples-seen", type=int, default=300 * BATCH, help="pairs per run")
    parser.add_argument("--lanes", type=int, default=1, help="trainings at a time, a core each")
    parser.add_argument("--comparisons", nargs="+", choices=list(COMPARISONS))
    parser.add_argument("--proxy", type=Path, help="run that scores the pool; else one is trained")
    parser.add_argument("--tokenizer", type=Path, help="of the proxy; else one is trained")
    parser.add_argument("--curate", action="append", default=[], metavar="ARM=OVERRIDES")
    parser.add_argument("--train", action="append", default=[], metavar="ARM=OVERRIDES")
    parser.add_argument("--page", type=Path, help="write the tables into it: docs/results.md")
    options = parser.parse_args()
    try:
        bench = Bench(options, chosen_arms(options))
        bench.prepare()
        # seed by seed: a run that is cut short has all arms of the first seeds
        jobs = [(arm, seed) for seed in options.seeds for arm in bench.arms]
        run_lanes(bench, jobs, options.lanes)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"earns_its_place: {error}")
    figures = bench.figures()
    write_json(options.out / "figures.json", figures)
    for name, comparison in COMPARISONS.items():
        print(f"\n{name}\n\n{table(comparison, figures)}")
    if options.page:
        fill(options.page, figures)


if __name__ == "__main__":
    main()
