"""Where curation runs: datatrove's executors behind one adapter; the work itself never knows.

Work is a list of *units*; a unit is done when its marker file exists, and it writes that file last
and atomically. So killing a run anywhere, running it twice, changing `tasks` or going from one
engine to another neither repeats nor loses a unit. Here is what the engines share, and the local
one; SLURM and Ray are in `curation/engines`.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess  # datatrove's: the standard one with dill
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger as datatrove_log
from tqdm import tqdm

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]  # on a node's PYTHONPATH: a checkout works uninstalled
TAIL_LINES = 12  # of a failed task's log, in the error: the end of a traceback


@dataclass(frozen=True)
class Unit:
    """One piece of work: `marker` appears when it is done; `size` is for the progress bar."""

    marker: Path
    arguments: tuple[Any, ...]
    size: int

    @property
    def done(self) -> bool:
        return self.marker.exists()


class Units(PipelineStep):
    """datatrove's view of the work: task `rank` of `world_size` takes every world_size-th unit."""

    name, type = "units", "pairwright"

    def __init__(self, function: Callable[..., None], units: Sequence[Unit]):
        super().__init__()
        self.function, self.units = function, units

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for unit in self.units[rank::world_size]:
            if not unit.done:
                self.function(*unit.arguments)
                assert unit.done, f"{unit.marker} was not written"
        return data


class Terse:
    """For datatrove's executors: no executor.json, which would hold every unit with its arguments
    (for each unit the pool's list of files again).
    """

    def save_executor_as_json(self, indent: int = 4) -> None:
        return


class _Local(Terse, LocalPipelineExecutor):
    """datatrove's local executor, its log lines in the log files only: on the console they would
    tear the bar.
    """

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank + 1, node_rank)  # 0 is the chatty one
        finally:
            datatrove_log.remove()  # it puts its default console handler back after each task


def _off_the_console(data: Any, rank: int, world_size: int) -> Any:
    """A first step that keeps a failure's traceback in the task's log: the command reports it.

    datatrove adds two handlers to each task, console first; loguru numbers handlers upwards.
    """
    probe = datatrove_log.add(lambda message: None)
    datatrove_log.remove(probe)
    with contextlib.suppress(ValueError):
        datatrove_log.remove(probe - 2)
    return data


class Engine:
    """What the engines share. workers: tasks at the same time; tasks: shares of the work (0: as
    many); retries: how often what is missing after a failure is given out again.
    """

    def __init__(self, *, workers: int, tasks: int, retries: int):
        if workers < 1 or tasks < 0 or retries < 0:
            raise ValueError(
                f"workers={workers}, tasks={tasks}, retries={retries}: workers must be at least 1 "
                "(engine=local: 0 for one per core), tasks and retries at least 0"
            )
        self.workers, self.tasks, self.retries = workers, tasks or workers, retries

    def run(
        self,
        name: str,
        function: Callable[..., None],
        units: Sequence[Unit],
        logs: Path,
        *,
        measure: str = "pair",
    ) -> int:
        """Call `function(*unit.arguments)` for each unit that is not done; returns how many were
        not, when all are.

        `logs`: a folder for the logs of each task; its name says which settings the units belong
        to (entries-<fingerprint>). `measure`: what unit sizes count. A failure that `retries` do
        not mend stops the run (here the unit's own exception, elsewhere a RuntimeError with the
        end of the task's log); what is done stays.
        """
        waiting = [unit for unit in units if not unit.done]
        todo = len(waiting)
        if units:
            log.info("%s: %s", name, news(len(units), todo, logs))
        for attempt in range(self.retries + 1):
            if not waiting:
                break
            tasks = min(self.tasks, len(waiting))
            datatrove_log.remove()
            with _progress(name, units, measure) as bar:
                self.execute(name, Units(function, waiting), tasks, logs, bar)
            missing = [index for index, unit in enumerate(waiting) if not unit.done]
            if missing:
                said = self.last_words(logs, missing[0] % tasks)
                report = f"{name}: {len(missing)} of {len(units)} units are missing; {said}"
                if attempt == self.retries:
                    raise RuntimeError(f"{report}\nwhat is done stays: the same command goes on")
                log.warning("%s\n%s: retry %d of %d", report, name, attempt + 1, self.retries)
            waiting = [waiting[index] for index in missing]
        return todo

    def execute(self, name: str, step: Units, tasks: int, logs: Path, bar: tqdm) -> None:
        """Run `tasks` shares of `step`; returns when all have ended, well or not."""
        raise NotImplementedError

    def last_words(self, logs: Path, rank: int) -> str:
        """The end of the log of a task."""
        return tail(logs / "logs" / f"task_{rank:05d}.log") or f"no log of task {rank} in {logs}"


class LocalEngine(Engine):
    """One machine. workers: processes side by side (0: one per core). An exception in a unit stops
    the run at once.
    """

    def __init__(self, *, workers: int = 0, tasks: int = 0):
        workers = workers if workers != 0 else len(os.sched_getaffinity(0))
        super().__init__(workers=workers, tasks=tasks, retries=0)

    def execute(self, name: str, step: Units, tasks: int, logs: Path, bar: tqdm) -> None:
        executor = _Local(
            pipeline=[_off_the_console, step],
            tasks=tasks,
            workers=min(self.workers, tasks),
            logging_dir=str(logs),
            skip_completed=False,  # the units' own markers decide
        )
        # Imported once by the server that all workers of all stages are forked from, instead of by
        # each of them: torch alone is 2 s of CPU.
        multiprocess.set_forkserver_preload([step.function.__module__])
        executor.run()


def news(units: int, todo: int, logs: Path) -> str:
    """What a stage finds before it starts, in words."""
    if not todo:
        return f"nothing to do, all {units} units are there ({logs.name})"
    if todo < units:
        return f"going on, {units - todo} of {units} units are there ({logs.name})"
    others = logs.parent.glob(f"{logs.name.rpartition('-')[0]}-*")
    new = any(other.name != logs.name for other in others)
    return f"{'new settings' if new else 'first run'} ({logs.name}), {units} units to do"


def tail(path: Path) -> str | None:
    """The last lines of a log, with its name; None when there is nothing in it."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n  ".join([f"{path} ends with:", *lines[-TAIL_LINES:]]) if lines else None


@contextlib.contextmanager
def _progress(name: str, units: Sequence[Unit], measure: str) -> Iterator[tqdm]:
    """A bar over finished units, with rate and time left; the markers are the only messenger."""
    waiting, stop = [unit for unit in units if not unit.done], threading.Event()
    total = sum(unit.size for unit in units)
    finished = total - sum(unit.size for unit in waiting)
    with tqdm(total=total, initial=finished, desc=name, unit=measure, unit_scale=True) as bar:

        def look() -> float:
            nonlocal waiting
            start, still = time.monotonic(), [unit for unit in waiting if not unit.done]
            bar.update(sum(unit.size for unit in waiting) - sum(unit.size for unit in still))
            waiting = still
            return time.monotonic() - start

        def watch() -> None:
            pause = 0.5
            while not stop.wait(pause):
                pause = max(0.5, 20 * look())  # a million markers: 5 % of a thread, not all of it

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            stop.set()
            thread.join()
            look()
