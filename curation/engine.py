"""Where curation runs: datatrove's executors behind one adapter; the work itself never knows.

Work is a list of *units*; a unit is done when its marker file exists, and it writes that file last
and atomically.
So killing a run anywhere, running it twice or changing `tasks` neither repeats nor loses a unit.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger as datatrove_log
from tqdm import tqdm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """One piece of work: `marker` appears when it is done; `size` is for the progress
    bar.
    """

    marker: Path
    arguments: tuple[Any, ...]
    size: int

    @property
    def done(self) -> bool:
        return self.marker.exists()


class _Units(PipelineStep):
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


class _QuietLocal(LocalPipelineExecutor):
    """datatrove's local executor, its log lines in the log files only: on the console they would
    tear the bar.
    """

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank + 1, node_rank)  # 0 is the chatty one
        finally:
            datatrove_log.remove()  # it puts its default console handler back after each task


class LocalEngine:
    """One machine. workers: processes side by side (0: one per core); tasks: shares of the work
    (0: as workers).
    """

    def __init__(self, *, workers: int = 0, tasks: int = 0):
        if workers < 0 or tasks < 0:
            raise ValueError(
                f"workers={workers}, tasks={tasks}: 0 means automatic, below is nothing"
            )
        self.workers = workers or len(os.sched_getaffinity(0))
        self.tasks = tasks or self.workers

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
        not.

        `logs`: a folder for datatrove's logs of each task. `measure`: what unit sizes count. An
        exception in a unit stops the run;
        what is done stays.
        """
        todo = [unit for unit in units if not unit.done]
        if not todo:
            log.info("%s: nothing to do, all %d units are there", name, len(units))
            return 0
        tasks = min(self.tasks, len(todo))
        executor = _QuietLocal(
            pipeline=[_Units(function, todo)],
            tasks=tasks,
            workers=min(self.workers, tasks),
            logging_dir=str(logs),
            skip_completed=False,  # the units' own markers decide
        )
        datatrove_log.remove()
        with _progress(name, units, measure):
            executor.run()
        return len(todo)


@contextlib.contextmanager
def _progress(name: str, units: Sequence[Unit], measure: str):
    """A bar over finished units, with rate and time left; the markers are the only
    messenger.
    """
    finished, stop = sum(u.size for u in units if u.done), threading.Event()
    waiting = [unit for unit in units if not unit.done]
    total = sum(unit.size for unit in units)
    with tqdm(total=total, initial=finished, desc=name, unit=measure, unit_scale=True) as bar:

        def look() -> None:
            nonlocal waiting
            bar.update(sum(unit.size for unit in waiting if unit.done))
            waiting = [unit for unit in waiting if not unit.done]

        def watch() -> None:
            while not stop.wait(0.5):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            look()
