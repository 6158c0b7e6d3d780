"""COMMAND: our panels in a W&B project. `python -m pipeline.dashboard project=P entity=E`.

Saves a workspace and a report, prints their addresses. Needs `wandb login`, the network, and
`pip install 'pairwright[dashboards]'`. Without any of them: `python -m pipeline.report run=runs/N`.
"""

import hydra
from omegaconf import DictConfig

from pipeline.config import CONF, check, user_errors
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


@hydra.main(version_base="1.3", config_path=CONF, config_name="dashboard")
def main(config: DictConfig) -> None:
    """Check, send, say where."""
    with user_errors("clip-dashboard"):
        check(config)
        print("\n".join(save(config)))


if __name__ == "__main__":
    main()
