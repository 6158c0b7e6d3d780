"""COMMAND: our panels in a W&B project.

    clip-dashboard project=P entity=E    # or python -m pipeline.dashboard

Saves a workspace and a report, prints their addresses. Needs `wandb login`, the network, and
`pip install 'pairwright[dashboards]'`. Without any of them: `clip-report run=runs/N`.
"""

from omegaconf import DictConfig

from pipeline.command import entry
from pipeline.config import check
from pipeline.tracking.dashboards import report, workspace


def save(config: DictConfig) -> list[str]:
    """Send both. Raises ValueError for a missing library, no login, or what W&B answers."""
    where = {"entity": config.entity, "project": config.project}
    try:
        made = [workspace(**where), report(**where, runs=config.runs)]
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'pairwright[dashboards]'") from error
    try:
        return [str((one.save() or one).url) for one in made]
    except Exception as error:  # W&B's client has no common base for network, login and refusals
        raise ValueError(
            f"W&B: {type(error).__name__}: {error}. `wandb login` first; without a network: python "
            "-m pipeline.report run=runs/N"
        ) from error


@entry("clip-dashboard", config="dashboard")
def main(config: DictConfig) -> None:
    """Check, send, say where."""
    check(config)
    print("\n".join(save(config)))


if __name__ == "__main__":
    main()
