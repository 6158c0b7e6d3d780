"""One run directory, one run at a time; and ranks that end with the process that started them."""

import ctypes
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK")
# A lock of a node that died is given up by NFSv4 after a lease (90 s) and a grace period as long.
LEASE_SECONDS = 200.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def first_process() -> bool:
    """Whether this is rank 0, or the process that will start the others."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def end_with_launcher() -> None:
    """A rank that Lightning's launcher started is killed when that dies (Linux).

    Else a rank whose launcher is killed before they have met waits half an hour for it. Ranks of
    srun and torchrun are left to those.
    """
    launched = "LOCAL_RANK" in os.environ and not {"RANK", "SLURM_PROCID"} & os.environ.keys()
    if not launched or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it has died already
        os._exit(1)


@contextmanager
def alone(directory: Path, *, lease_seconds: float = LEASE_SECONDS) -> Iterator[bool]:
    """Hold `directory`/lock while a run is at work in it; rank 0 does so for the others.

    Gives whether this process holds it: not where the file system has no locks, nor on other ranks.
    A record lock of the system: it ends with the process, however that ends, is not inherited by
    loader workers, and is seen by other nodes where the file system shares locks (NFS, Lustre with
    flock).
    Raises ValueError when another process holds it, with what that left in the file. A SLURM job
    that is queued again waits `lease_seconds` for itself: its dead node's lock may live on so long.
    """
    if not first_process():
        yield False
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    with open(path, "a+b") as file:
        try:
            take(file, directory, lease_seconds)
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): start this name once only", path, error)
            yield False
            return
        file.truncate(0)
        file.write(json.dumps(holder()).encode())
        file.flush()
        yield True


def take(file: BinaryIO, directory: Path, lease_seconds: float) -> None:
    """Lock a file, or raise ValueError naming who has."""
    until, said = time.monotonic() + lease_seconds, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            other = file.read().decode(errors="replace").strip()
            if not is_this_job(other) or time.monotonic() > until:
                raise ValueError(
                    f"{directory} is being trained by {other or 'another process'}: end that "
                    "first, or give another name=..."
                ) from error
        if not said:
            log.info("%s: waiting for the lock that this job left on %s", directory, other)
            said = True
        time.sleep(min(1.0, lease_seconds / 4))


def holder() -> dict[str, str | int]:
    """Who this is, for the message that refuses another."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "process": os.getpid()} | ({"job": job} if job else {})


def is_this_job(other: str) -> bool:
    """Whether the holder is an earlier life of this SLURM job, on another node."""
    try:
        left = json.loads(other)
    except ValueError:
        return False
    mine = holder()
    return "job" in mine and left.get("job") == mine["job"] and left.get("host") != mine["host"]
