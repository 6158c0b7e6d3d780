"""A dataset in W&B: its manifest as an artifact (the dataset's version), its steps as a table.

A training run that names the artifact as its input then shows which selection it saw. Offline by
default: `wandb sync` sends it later.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


class WandbDataset:
    """project, mode: as in training; directory: where W&B writes (null: beside the shards)."""

    def __init__(
        self,
        *,
        project: str = "pairwright",
        mode: Literal["offline", "online"] = "offline",
        directory: str | None = None,
    ):
        if mode not in ("offline", "online"):
            raise ValueError(f"track.mode={mode}: modes are offline, online")
        self.project, self.mode, self.directory = project, mode, directory

    def log(self, out: Path, manifest: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """One run of type "curation" with the table, the counts and the artifact."""
        import wandb

        place = Path(self.directory) if self.directory else out.parent / f"{out.name}.wandb"
        place.mkdir(parents=True, exist_ok=True)
        config = {step["name"]: step["config"] for step in manifest["steps"]}
        with wandb.init(
            project=self.project,
            job_type="curation",
            name=out.name,
            id=f"curation-{manifest['pack']}",
            dir=str(place),
            mode=self.mode,
            config={"seed": manifest["seed"], "pool": manifest["pool"], "steps": config},
        ) as run:
            table = wandb.Table(columns=["step", "read", "kept", "reason", "dropped"])
            for step in manifest["steps"]:
                for reason, dropped in (step["dropped"] or {"": 0}).items():
                    table.add_data(step["name"], step["read"], step["kept"], reason, dropped)
                    if reason:
                        run.summary[f"curation/{step['name']}/{reason}"] = dropped
            run.summary["curation/pairs"] = manifest["num_samples"]
            run.log({"curation/steps": table})
            # As a training run names it (pipeline/tracking/lineage.py): the manifest alone.
            dataset = wandb.Artifact(
                re.sub(
                    r"[^\w.-]",
                    "-",
                    f"dataset-{manifest['pool']}-{out.resolve().name}",
                    flags=re.ASCII,
                )[:128],
                type="dataset",
                metadata={
                    "selection": manifest["selection"],
                    "num_samples": manifest["num_samples"],
                    "num_bytes": manifest["num_bytes"],
                    "read": card["read"],
                },
            )
            dataset.add_file(str(out / "manifest.json"))
            run.log_artifact(dataset)
            run.log({"curation/report": wandb.Html((out / "report.html").read_text())})
