"""One run directory, one run at a time."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID")


def first_process() -> bool:
    """Whether this is rank 0, or the process that will start the others."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold `directory`/lock while a run is at work in it; rank 0 does so for the others.

    A record lock of the system: it ends with the process, however that ends, is not inherited by
    loader workers, and is seen by other nodes where the file system shares locks (NFS, Lustre with
    flock).
    Raises ValueError when another process holds it, with what that left in the file.
    """
    if not first_process():
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"{directory} is being trained by {file.read().strip() or 'another process'}: end "
                "that first, or give another name=..."
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): start this name once only", path, error)
        file.truncate(0)
        json.dump(holder(), file)
        file.flush()
        yield


def holder() -> dict[str, str | int]:
    """Who this is, for the message that refuses another."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "process": os.getpid()} | ({"job": job} if job else {})
