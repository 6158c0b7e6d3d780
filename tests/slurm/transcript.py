"""Type the scenarios of docs/slurm.md at a real SLURM of this machine, and write what it answers.

python -m tests.slurm.transcript --page docs/slurm.md      # as root, with SLURM installed
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import ROOT, picture
from tests.slurm.conftest import Slurm, running

HEAD = """# A run on SLURM, as it was typed

Written by `python -m tests.slurm.transcript --page docs/slurm.md` on a SLURM {version} of one
node, {day}; the node claims 8 cores and has 2. Each block is what was typed and what was answered;
folders and the node's name are shortened. The same four scenarios are tests (`make test-engines`,
in CI on every change). How to set it up, and what to do when it fails:
[slurm/README.md](../slurm/README.md).
"""


class Terminal:
    """Commands in a folder, and the page that they make."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder, self.lines = folder, []
        tools = Path(sys.executable).parent
        self.env = slurm.env | {
            **{"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "GLOO_SOCKET_IFNAME": "lo"},
            "PATH": f"{tools}:{slurm.env['PATH']}",
            "PYTHONPATH": f"{ROOT / 'tests' / 'slurm'}:{ROOT}",
            "FLAKY_FAILURES": str(folder / "failures"),
        }

    def say(self, text: str) -> None:
        self.lines += ["", text, ""]

    def type(self, command: str, *, keep: str = ".", last: int = 30) -> str:
        """Run a command; of its output the page has the lines that match `keep`."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout[-3000:]}")
        lines = [re.sub(r"^.*pair/s\]", "", line) for line in done.stdout.splitlines()]
        hidden = r"\d+%\||sacct error"  # progress bars; this SLURM keeps no accounts
        shown = [n for n in lines if re.search(keep, n) and not re.search(hidden, n)]
        self.lines += [f"    $ {command}", *(f"    {self.short(line)}" for line in shown[-last:])]
        return done.stdout

    def short(self, line: str) -> str:
        host = socket.gethostname().split(".")[0]
        line = line.replace(str(self.folder), "~").replace(str(ROOT), "pairwright")
        return re.sub(rf"\b{re.escape(host)}\b", "node01", line).rstrip()[:160]

    def wait(self, job: str, state: str = "COMPLETED", seconds: float = 400) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            shown = self.quiet(f"scontrol show job {job} --oneliner")
            if f"JobState={state}" in shown:
                return
            if "Reason=BeginTime" in shown and "JobState=PENDING" in shown:
                # a job that is queued again is held for two minutes
                self.quiet(f"scontrol update JobId={job} StartTime=now+5")
                time.sleep(8)
            time.sleep(0.5)
        raise RuntimeError(f"job {job} is not {state}: {shown}")

    def quiet(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout

    def wait_for(self, file: str, lines: int, seconds: float = 240) -> None:
        until, path = time.monotonic() + seconds, self.folder / file
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            if time.monotonic() > until:
                raise RuntimeError(f"{file} has no {lines} lines")
            time.sleep(0.05)


def scene(terminal: Terminal) -> None:
    """A pool of 80 pairs, and the files that one types from."""
    (terminal.folder / "pool").mkdir()
    (terminal.folder / "failures").mkdir()
    for name in ("slurm", "examples"):
        (terminal.folder / name).symlink_to(ROOT / name)
    rows = [
        {"image": {"bytes": picture(n), "path": f"{n}.png"}, "caption": f"thing number {n}"}
        for n in range(80)
    ]
    for number in range(3):
        table = pa.Table.from_pylist(rows[number::3])
        pq.write_table(table, terminal.folder / "pool" / f"part-{number}.parquet")


def curation(terminal: Terminal) -> None:
    terminal.say("## Curation as an array of jobs, one of whose tasks fails")
    (terminal.folder / "failures" / "once").touch()
    terminal.say(
        "`flaky.Flaky` is an annotator of the tests: its first unit raises, as on a node whose "
        "disk is broken. The unit is given out again, nothing else is done twice."
    )
    terminal.type(
        "clip-curate dataset=raw pool=pool out=shards +annotate.flaky._target_=flaky.Flaky "
        "allow_foreign_targets=true engine=slurm engine.partition=main engine.workers=3 "
        "engine.memory_gib=1 engine.poll_seconds=0.5 engine.retries=1",
        keep=r"RuntimeError|retry|curated",
        last=14,
    )
    terminal.type("ls shards")


def training(terminal: Terminal) -> None:
    terminal.say("## Two tasks, a signal, and the same bits")
    words = (
        "recipe=small debug=tiny data.shards=shards samples_seen=6400 global_batch_size=32 "
        "micro_batch_size=8 checkpoint_every_steps=1000 trainer.accelerator=cpu"
    )
    options = "--parsable --ntasks-per-node=2 --cpus-per-task=1"
    job = terminal.type(
        f"sbatch {options} --output=whole.log slurm/train.sbatch name=whole {words}"
    ).strip()
    terminal.wait(job)
    terminal.type("grep -E 'processes|samples|steps' whole.log | head -8")
    terminal.say("The same again, and in its midst the signal that a preemption sends:")
    job = terminal.type(
        f"sbatch {options} --output=cut.log slurm/train.sbatch name=cut {words}"
    ).strip()
    terminal.wait_for("runs/cut/metrics.jsonl", 4)
    terminal.type("squeue --format='%i %j %T %N'")
    terminal.type(f"scancel --signal=USR1 {job}")
    terminal.wait(job)
    terminal.type("grep -E 'stopped after|exit code|continuing' cut.log")
    terminal.type(f"scontrol show job {job} | grep -oE '(JobState|Restarts|ExitCode)=[^ ]*'")
    terminal.say("Both runs have the same losses and the same weights:")
    terminal.type(
        "for run in whole cut; do python -c \"import json,sys; print([json.loads(l)['train/loss'] "
        "for l in open(f'runs/{sys.argv[1]}/metrics.jsonl')])\" $run | sha256sum; done"
    )
    terminal.type(
        'for run in whole cut; do python -c "import sys; from pipeline.evals.trained import *; '
        "print(weights_hash(TrainedClip.load(f'runs/{sys.argv[1]}').model))\" $run; done"
    )


def sweep(terminal: Terminal) -> None:
    terminal.say("## A sweep of two jobs")
    terminal.type(
        "python -m pipeline.train -m recipe=small debug=tiny data.shards=shards samples_seen=96 "
        "global_batch_size=32 'name=lr${optimizer.lr}' optimizer.lr=0.001,0.002 "
        "trainer.accelerator=cpu hydra/launcher=submitit_slurm hydra.launcher.cpus_per_task=1 "
        "hydra.launcher.mem_gb=2 hydra.sweep.dir=sweep",
        keep=r"Launching|#\d : ",
    )
    terminal.type("wc -l runs/lr0.00*/metrics.jsonl")


def chain(terminal: Terminal) -> None:
    terminal.say("## Train, evaluate, export: one command")
    shown = terminal.type(
        "slurm/chain.sh --ntasks-per-node=2 --cpus-per-task=1 --output=chain-%j.log -- "
        "recipe=small debug=tiny name=chained data.shards=shards samples_seen=192 "
        "global_batch_size=32 trainer.accelerator=cpu -- "
        "eval=emoji accelerator=cpu -- format=open_clip"
    )
    jobs = re.findall(r"^\w+ (\d+)$", shown, flags=re.MULTILINE)
    terminal.type("squeue --format='%i %j %T %E'")
    for job in jobs:
        terminal.wait(job)
    terminal.type("cat runs/chained/eval/retrieval.json | head -5")
    terminal.type("ls runs/chained/export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, required=True)
    page = parser.parse_args().page
    with contextmanager(running)() as slurm, tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        terminal = Terminal(Path(folder), slurm)
        scene(terminal)
        version = terminal.quiet("sinfo --version").split()[-1]
        for part in (curation, training, sweep, chain):
            part(terminal)
            print(f"{part.__name__} done")
    text = HEAD.format(version=version, day=date.today()) + "\n".join(terminal.lines) + "\n"
    page.write_text(re.sub(r"\n{3,}", "\n\n", text))


if __name__ == "__main__":
    main()
