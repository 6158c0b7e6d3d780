"""engine=ray: the tasks of a stage as actors of a Ray cluster, with reserved resources.

Pool, cache and `out` must lie on a file system that all nodes see under the same path.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from datatrove.executor import RayPipelineExecutor
from tqdm import tqdm

from curation.engine import ROOT, Engine, Terse, Units


class _Ray(Terse, RayPipelineExecutor):
    """datatrove's Ray executor."""


class RayEngine(Engine):
    """address: of the cluster; "auto": the one that this node belongs to; null: Ray on this machine
        alone, which starts and ends with the command.
    workers: tasks at the same time; tasks: shares of the work (0: as workers).
    memory_gib, cpus_per_task, gpus_per_task: what Ray reserves for a task, which is one process.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int = 16,
        tasks: int = 0,
        memory_gib: float = 4.0,
        cpus_per_task: int = 1,
        gpus_per_task: int = 0,
        retries: int = 2,
    ):
        super().__init__(workers=workers, tasks=tasks, retries=retries)
        if memory_gib <= 0 or cpus_per_task < 1 or gpus_per_task < 0:
            raise ValueError(
                f"engine: memory_gib={memory_gib} and cpus_per_task={cpus_per_task} must be "
                f"positive, gpus_per_task={gpus_per_task} at least 0"
            )
        self.address, self.memory_gib = address, memory_gib
        self.cpus_per_task, self.gpus_per_task = cpus_per_task, gpus_per_task

    def execute(self, name: str, step: Units, tasks: int, logs: Path, bar: tqdm) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("engine=ray needs Ray: pip install 'pairwright[ray]'") from error
        if not ray.is_initialized():
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            own = {"num_cpus": self.workers * self.cpus_per_task, "include_dashboard": False}
            ray.init(
                address=self.address or "local",
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                **({} if self.address else own),
            )
        self._check_resources(ray.cluster_resources())
        executor = _Ray(
            pipeline=[step],
            tasks=tasks,
            workers=self.workers,
            cpus_per_task=self.cpus_per_task,
            gpus_per_task=self.gpus_per_task,
            mem_per_cpu_gb=self.memory_gib / self.cpus_per_task,
            logging_dir=str(logs),
            skip_completed=False,  # the units' own markers decide
        )
        executor.run()

    def _check_resources(self, there: Mapping[str, float]) -> None:
        """Ray would wait forever for a place that no node has."""
        wanted = {
            "CPU": ("cpus_per_task", self.cpus_per_task, there.get("CPU", 0)),
            "GPU": ("gpus_per_task", self.gpus_per_task, there.get("GPU", 0)),
            "memory": ("memory_gib", self.memory_gib, there.get("memory", 0) / 2**30),
        }
        for what, (knob, need, have) in wanted.items():
            if have < need:
                raise ValueError(
                    f"engine.{knob}={need}, but the whole Ray cluster has {have:.3g} ({what}): "
                    f"lower engine.{knob}, or start more nodes"
                )
