"""engine=slurm: each stage is an array of SLURM jobs; the command submits it, waits and goes on.

Pool, cache and `out` must lie on a file system that all nodes see under the same path.
"""

import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from tqdm import tqdm

from curation.engine import ROOT, Engine, Terse, Units, tail

log = logging.getLogger(__name__)
MAX_ARRAY = 1000  # SLURM's default MaxArraySize is 1001, one above the highest index
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class _Slurm(Terse, SlurmPipelineExecutor):
    """datatrove's SLURM executor without its second job: that one merges statistics that we have
    no use for, and waits forever when the array fails (datatrove issue 238).
    """

    def launch_merge_stats(self) -> None:
        return

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """With `mem` in the place of `mem-per-cpu` (sbatch takes one of them), without nulls."""
        args = super().get_sbatch_args(max_array)
        del args["mem-per-cpu"]
        return {key: value for key, value in args.items() if value is not None}


class SlurmEngine(Engine):
    """partition: see sinfo.
    workers: jobs of the array that run at the same time; tasks: jobs of the array, 1,000 at most
        (a job works through many units).
    time: limit of a job, as sbatch writes it. A job that runs into it is given out again, as any
        that fails, without its finished units.
    memory_gib, cpus_per_task: of a job, which is one process; more cores help only annotators with
        threads of their own.
    sbatch: more options of sbatch, e.g. {account: vision, gres: "gpu:1"}; null removes one.
    setup: shell lines that make Python ready on a node; null: the Python that runs this.
    poll_seconds: between two looks at squeue. settle_seconds: how long after the end of a job a
        marker may take to show up here (attribute caches of network file systems).
    """

    def __init__(
        self,
        *,
        partition: str,
        workers: int = 16,
        tasks: int = 0,
        time: str = "24:00:00",
        memory_gib: int = 4,
        cpus_per_task: int = 1,
        sbatch: Mapping[str, Any] | None = None,
        setup: str | None = None,
        retries: int = 2,
        poll_seconds: float = 10.0,
        settle_seconds: float = 30.0,
    ):
        super().__init__(workers=workers, tasks=tasks, retries=retries)
        if self.tasks > MAX_ARRAY:
            raise ValueError(
                f"engine.tasks={self.tasks}: an array holds {MAX_ARRAY} jobs at most; each works "
                "through its share of the units, so fewer do the same work"
            )
        if memory_gib < 1 or cpus_per_task < 1 or poll_seconds <= 0 or settle_seconds < 0:
            raise ValueError(
                f"engine: memory_gib={memory_gib}, cpus_per_task={cpus_per_task}, poll_seconds="
                f"{poll_seconds} must be positive, settle_seconds={settle_seconds} at least 0"
            )
        self.partition, self.time, self.memory_gib = partition, time, memory_gib
        self.cpus_per_task, self.sbatch, self.setup = cpus_per_task, dict(sbatch or {}), setup
        self.poll_seconds, self.settle_seconds = poll_seconds, settle_seconds

    def execute(self, name: str, step: Units, tasks: int, logs: Path, bar: tqdm) -> None:
        if not shutil.which("sbatch"):
            raise ValueError("engine=slurm: no sbatch here; use a login node, or engine=local")
        job_file = logs / "slurm_job"
        self._wait_for_an_earlier_run(name, job_file, bar)
        job = self._submit(name, step, tasks, logs)
        job_file.write_text(job)
        try:
            self._wait(name, job, bar)
        except KeyboardInterrupt:
            subprocess.run(["scancel", job], check=False)
            raise
        until = time.monotonic() + self.settle_seconds
        while not all(unit.done for unit in step.units) and time.monotonic() < until:
            time.sleep(1)
        job_file.unlink()

    def _submit(self, name: str, step: Units, tasks: int, logs: Path) -> str:
        """The id of the array's job."""
        python = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        modules = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
        executor = _Slurm(
            pipeline=[step],
            tasks=tasks,
            workers=self.workers,
            time=self.time,
            partition=self.partition,
            cpus_per_task=self.cpus_per_task,
            job_name=_job_name(name),
            qos="",
            env_command=f"{self.setup or python}\n{modules}",
            sbatch_args={"mem": f"{self.memory_gib}G"} | self.sbatch,
            max_array_size=MAX_ARRAY,
            logging_dir=str(logs),
            slurm_logs_folder=str(logs / "slurm_logs"),
            skip_completed=False,  # the units' own markers decide
            with_srun=False,  # one process on one node is what the batch script is already
        )
        for folder in ("logs", "slurm_logs"):  # of an earlier array: its last words are not ours
            shutil.rmtree(logs / folder, ignore_errors=True)
        try:
            executor.launch_job()
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"sbatch refused the job; its words are above, its script is {logs}/"
                f"launch_script.slurm: see engine.partition={self.partition}, engine.time="
                f"{self.time}, engine.memory_gib={self.memory_gib} and engine.sbatch"
            ) from error
        return executor.job_id

    def _wait_for_an_earlier_run(self, name: str, job_file: Path, bar: tqdm) -> None:
        """Killing the command leaves its array at work: let that end before another is sent."""
        job = job_file.read_text() if job_file.exists() else ""
        if job and any(row[2] == _job_name(name) for row in queue(job) or []):
            log.info("%s: waiting for job %s, which an earlier run has left at work", name, job)
            self._wait(name, job, bar)

    def _wait(self, name: str, job: str, bar: tqdm) -> None:
        """Return when the job has left the queue; the bar shows states and reasons of waiting."""
        warned: set[str] = set()
        while (rows := queue(job)) != []:
            states = Counter(f"{state} ({reason})" for state, reason, _ in rows or [])
            bar.set_postfix_str(f"job {job}: " + ", ".join(f"{n} {s}" for s, n in states.items()))
            for state in states:
                if "held" in state.lower() and state not in warned:
                    log.warning("%s: job %s is %s; scontrol release %s", name, job, state, job)
                    warned.add(state)
            time.sleep(self.poll_seconds)

    def last_words(self, logs: Path, rank: int) -> str:
        """datatrove's log of the task and SLURM's: a job killed from outside says so only there."""
        outputs = sorted((logs / "slurm_logs").glob(f"*_{rank}.out"))
        found = [tail(path) for path in (logs / "logs" / f"task_{rank:05d}.log", *outputs)]
        return "\n".join(filter(None, found)) or f"no log of task {rank} in {logs}"


def _job_name(name: str) -> str:
    return f"clip-curate-{name}"


def queue(job: str) -> list[tuple[str, ...]] | None:
    """(state, reason, job name) of what SLURM still has to do of a job; None: no answer.

    squeue, not sacct: many sites keep no accounting.
    """
    command = ["squeue", "--noheader", "--array", "--jobs", job, "--format", "%T|%r|%j"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return [] if "Invalid job id" in done.stderr else None
    rows = [tuple(line.split("|", 2)) for line in done.stdout.splitlines()]
    return [row for row in rows if row[0] not in ENDED]
