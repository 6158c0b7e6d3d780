"""Batches of a loader whose workers may die: said between two batches, never within a step."""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

DEATH = re.compile(
    r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal)"
    r"|Pin memory thread exited unexpectedly"
)
CUT = (ConnectionError, EOFError, FileNotFoundError)  # of a batch whose sender dies meanwhile


class WorkerDied(RuntimeError):
    """A loader's worker was killed, or died of what it read."""


def batches(loader: DataLoader) -> Iterator[Any]:
    """A loader's batches. Raises WorkerDied; it may take torch's five seconds to be noticed."""
    before = signal.getsignal(signal.SIGCHLD)
    found = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # torch's handler would raise in the middle of whatever runs, a step for instance
        signal.signal(signal.SIGCHLD, before)
    while True:
        try:
            batch = next(found)
        except StopIteration:
            return
        except RuntimeError as error:
            words = str(error)
            if DEATH.match(words):  # an error of the dataset has other first words
                raise WorkerDied(words.splitlines()[0]) from error
            raise
        except CUT as error:
            if loader.num_workers and not str(error).startswith("Caught "):  # by a living worker
                words = f"a DataLoader worker died while it sent a batch ({error!r})"
                raise WorkerDied(words) from error
            raise
        yield batch


class Plan:
    """A batch sampler: the DataLoader wants something that can be iterated more than once."""

    def __init__(self, plan: Callable[[], Iterator[list[Any]]]):
        self.plan = plan

    def __iter__(self) -> Iterator[list[Any]]:
        return self.plan()
