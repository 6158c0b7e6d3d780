"""COMMAND: shards and a proxy model -> a captioner of our own.

    python -m pipeline.train_captioner data.shards=DIR run=runs/PROXY name=N

The proxy gives image tower, tokenizer and transform. The same name continues a run from its last
checkpoint; a changed config under an old name is refused.
"""

import logging
import warnings

import hydra
from omegaconf import DictConfig

from pipeline.check import processes
from pipeline.config import CONF, check, user_errors
from pipeline.trainer.captioner import train_captioner


@hydra.main(version_base="1.3", config_path=CONF, config_name="train_captioner")
def main(cfg: DictConfig) -> None:
    """Compose, check, run."""
    with user_errors("train_captioner"):
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module="lightning")
        check(cfg, world_size=processes(cfg))
        train_captioner(cfg)


if __name__ == "__main__":
    main()
