"""A real SLURM of one node in a temporary folder: munged, slurmctld and slurmd of our own, as root.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge

Nothing outside the folder is touched (own key, socket, ports, state), and it ends with the session.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
CPUS = 8  # what the node claims to have: tasks wait for a core otherwise
CONFIG = """
ClusterName=testcluster
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldPort={controller_port}
SlurmdPort={node_port}
KillWait=5
MinJobAge=300
JobRequeue=1
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. env: what a subprocess needs to talk to it (SLURM_CONF in it)."""

    folder: Path
    partition: str
    env: dict[str, str]

    def command(self, *words: str) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=True)
        return done.stdout

    def jobs(self) -> list[str]:
        """Names of the jobs that wait or run."""
        return self.command("squeue", "--noheader", "--array", "--format", "%j").split()


def reason_to_skip() -> str | None:
    """Why SLURM cannot run here, if so."""
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    if missing:
        return (
            f"SLURM: no {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)"
        )
    return None if os.geteuid() == 0 else "SLURM: slurmd starts jobs for others, so it needs root"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(folder: Path, name: str, *words: str, env: dict[str, str]) -> subprocess.Popen:
    """A daemon in the foreground, so that it is ours to end."""
    with open(folder / f"{name}.log", "wb") as sink:
        return subprocess.Popen(
            [name, *words], env=env, stdout=sink, stderr=sink, start_new_session=True
        )


def wait_until_idle(cluster: Slurm, daemons: list[subprocess.Popen]) -> None:
    """Until the node takes jobs. Raises RuntimeError with the daemons' words when it never does."""
    until = time.monotonic() + 60
    while time.monotonic() < until and all(daemon.poll() is None for daemon in daemons):
        done = subprocess.run(
            ["sinfo", "--noheader", "--format", "%t"],
            env=cluster.env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    logs = [f"{p.name}:\n{p.read_text()[-2000:]}" for p in sorted(cluster.folder.glob("*.log"))]
    raise RuntimeError("SLURM does not start:\n" + "\n".join(logs))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A cluster of one node with 8 (claimed) cores, partition `main`; skips with the reason."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    yield from running()


def running() -> Iterator[Slurm]:
    """The cluster, until the iterator goes on."""
    # not tmp_path: pytest's folders are private, and a socket's path has 107 bytes at most
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    controller_port, node_port = free_ports(2)
    values = {"controller_port": controller_port, "node_port": node_port, "cpus": CPUS}
    conf = folder / "slurm.conf"
    conf.write_text(CONFIG.format(host=host, folder=folder, **values))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    path = os.pathsep.join([inherited.get("PATH", ""), "/usr/sbin", "/sbin"])
    cluster = Slurm(folder, "main", inherited | {"PATH": path, "SLURM_CONF": str(conf)})
    munge = [f"--{key}-file={folder}/munge.{key}" for key in ("key", "pid", "log", "seed")]
    daemons: list[subprocess.Popen] = []
    try:
        words = ("--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        daemons.append(start(folder, "munged", *words, env=cluster.env))
        while not (folder / "munge.socket").exists() and daemons[0].poll() is None:
            time.sleep(0.05)
        daemons.append(start(folder, "slurmctld", "-D", "-c", "-f", str(conf), env=cluster.env))
        daemons.append(start(folder, "slurmd", "-D", "-c", "-f", str(conf), env=cluster.env))
        wait_until_idle(cluster, daemons)
        yield cluster
        cluster.command("scancel", "--user=root")
        until = time.monotonic() + 15
        while cluster.jobs() and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)
