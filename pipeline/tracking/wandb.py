"""Weights & Biases: the run's name is its id, so a resumed run continues its curves. Offline by
default.
"""

from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

MODES = ("offline", "online")


def wandb_logger(
    *, name: str, directory: str, project: str = "pairwright", mode: str = "offline"
) -> WandbLogger:
    """mode: offline writes below `directory` only (`wandb sync` sends it later); online needs a
    login.

    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"tracking.wandb.mode={mode}: modes are {', '.join(MODES)}")
    Path(directory).mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(
        project=project, name=name, id=name, save_dir=directory, offline=mode == "offline"
    )
    logger.experiment.define_metric("samples_seen")
    logger.experiment.define_metric("*", step_metric="samples_seen")
    return logger
