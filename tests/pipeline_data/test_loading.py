"""A worker that dies is told apart from a dataset that raises."""

import pytest
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from pipeline.data.loading import WorkerDied, batches


class Ends(DataLoader):
    """A loader of two workers that gives one batch, then calls `end`."""

    def __init__(self, end):
        super().__init__(range(2), num_workers=2)
        self.end = end

    def __iter__(self):
        yield 0
        self.end()


def raises(error):
    def end():
        raise error

    return end


def reraises(error):
    """What the parent does with an error of a worker's dataset."""
    try:
        raise error
    except type(error):
        return ExceptionWrapper(where="in DataLoader worker process 0").reraise


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        FileNotFoundError(2, "No such file or directory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        RuntimeError("Pin memory thread exited unexpectedly"),
    ],
)
def test_whatever_a_killed_worker_leaves_is_a_death(error):
    found = batches(Ends(raises(error)))
    assert next(found) == 0
    with pytest.raises(WorkerDied):
        next(found)


@pytest.mark.parametrize("kind", [ConnectionError, EOFError, FileNotFoundError, RuntimeError])
def test_errors_of_the_dataset_stay_theirs(kind):
    with pytest.raises(kind, match="of the dataset") as caught:
        list(batches(Ends(reraises(kind("of the dataset")))))
    assert not isinstance(caught.value, WorkerDied)
