"""What came of what, in W&B: dataset -> checkpoint -> evaluation, as artifacts and their uses.

An artifact is known by its content: a dataset is its manifest, so `clip-curate track=wandb` and a
run that trains on the shards name the same version. Weights are referred to where they lie, and
not sent. All of it is written offline too, and arrives with `wandb sync`.
"""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import wandb

from pipeline.shards import read_manifest


def artifact_name(kind: str, name: str) -> str:
    """W&B allows letters, digits, dashes, underscores and dots, 128 of them."""
    return re.sub(r"[^\w.-]", "-", f"{kind}-{name}", flags=re.ASCII)[:128]


def dataset_artifact(directory: Path) -> wandb.Artifact:
    """A directory of shards, by its pool's name and its own. Its content is manifest.json alone,
    which has each shard's sha256.
    """
    pool = read_manifest(directory).get("pool")
    name = "-".join(part for part in (pool, directory.resolve().name) if part)
    artifact = wandb.Artifact(artifact_name("dataset", name), type="dataset")
    artifact.add_file(str(directory / "manifest.json"))
    return artifact


def checkpoint_artifact(run: str, path: Path, metadata: Mapping[str, Any]) -> wandb.Artifact:
    """A checkpoint of a run, by its address and its checksum. Reads the file once."""
    artifact = wandb.Artifact(
        artifact_name("checkpoint", run), type="model", metadata=dict(metadata)
    )
    artifact.add_reference(path.absolute().as_uri(), name=path.name)
    return artifact


def used(run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Say that the run reads what the artifact is.

    W&B's own `use_artifact` refuses offline runs ("Cannot use artifact when in offline mode."),
    though what it does of a new artifact, to log it as used, is written and synced like anything
    else. Hence two names that are W&B's own (as of 0.31); delete the first branch when it takes
    a new artifact offline.
    """
    if run.settings._offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


class WandbEvaluation:
    """The numbers of a command as a W&B run of type "evaluation", which uses the checkpoint.

    project, mode: as in training.  directory: where W&B writes; null: the run's own folder.
    Its id is of the checkpoint, the weights and the tasks: the same evaluation again is the same
    W&B run, and another is another.
    """

    def __init__(
        self, *, project: str = "pairwright", mode: str = "offline", directory: str | None = None
    ) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"track.mode={mode}: modes are offline, online")
        self.project, self.mode, self.directory = project, mode, directory

    def log(
        self, trained_in: Path, checkpoint: Path, numbers: Mapping[str, float], *, weights: str
    ) -> None:
        """trained_in: the run's folder, whose name is the training's in W&B.  numbers: by
        eval/<task>/<metric>.  weights: of the checkpoint, "trained" or "ema".
        """
        name = trained_in.resolve().name
        tasks = sorted({key.split("/")[1] for key in numbers})
        which = sha256("\n".join([weights, *tasks]).encode()).hexdigest()[:8]
        with wandb.init(
            project=self.project,
            job_type="evaluation",
            group=name,
            name=f"{name}-{checkpoint.stem}-{weights}",
            id=artifact_name(f"evaluation-{which}", f"{name}-{checkpoint.stem}"),
            dir=self.directory or str(trained_in),
            mode=self.mode,
            config={
                "run": name,
                "checkpoint": checkpoint.name,
                "weights": weights,
                "tasks": tasks,
            },
        ) as run:
            used(run, checkpoint_artifact(name, checkpoint, {}))
            run.summary.update({key: float(value) for key, value in numbers.items()})
