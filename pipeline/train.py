"""COMMAND: shards -> a trained model. `python -m pipeline.train recipe=R name=N data.shards=DIR
...`.

The same name continues a run from its last checkpoint; a changed config under an old name is
refused.
"""

import logging
import os
import sys
import warnings

import hydra
from omegaconf import DictConfig

from pipeline.check import processes
from pipeline.config import CONF, check
from pipeline.trainer.run import train


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> None:
    """Compose, check, run; a user's mistake ends with one message and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        check(cfg, world_size=processes(cfg))
        train(cfg)
    except ValueError as error:
        if os.environ.get("PAIRWRIGHT_TRACEBACK"):
            raise
        print(f"clip-train: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
