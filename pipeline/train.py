"""COMMAND: shards -> a trained model. `python -m pipeline.train recipe=R name=N data.shards=DIR
...`.

The same name continues a run from its last checkpoint; a changed config under an old name is
refused.
"""

import logging
import warnings

import hydra
from omegaconf import DictConfig

from pipeline.check import processes
from pipeline.config import CONF, check, user_errors
from pipeline.trainer.run import train


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> None:
    """Compose, check, run."""
    with user_errors("clip-train"):
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="lightning")
        check(cfg, world_size=processes(cfg))
        train(cfg)


if __name__ == "__main__":
    main()
