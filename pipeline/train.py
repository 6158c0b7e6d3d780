"""COMMAND: shards -> a trained model.

    clip-train recipe=R name=N data.shards=DIR [KEY=VALUE ...]    # or python -m pipeline.train

The same name continues a run from its last checkpoint; a changed config under an old name is
refused. `clip-check` with the same words says what is wrong with them, and what the run will cost.
"""

import logging
import warnings

from omegaconf import DictConfig

from pipeline.check import processes
from pipeline.command import entry
from pipeline.config import check
from pipeline.trainer.run import train


@entry("clip-train", config="train", choices="recipe")
def main(cfg: DictConfig) -> None:
    """Compose, check, run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    check(cfg, world_size=processes(cfg))
    train(cfg)


if __name__ == "__main__":
    main()
