"""COMMAND: shards and a proxy model -> a captioner of our own.

    clip-train-captioner data.shards=DIR run=runs/PROXY name=N

The proxy gives image tower, tokenizer and transform. The same name continues a run from its last
checkpoint; a changed config under an old name is refused.
"""

import logging
import warnings

from omegaconf import DictConfig

from pipeline.check import processes
from pipeline.command import entry
from pipeline.config import check
from pipeline.trainer.captioner import train_captioner


@entry("clip-train-captioner", config="train_captioner")
def main(cfg: DictConfig) -> None:
    """Compose, check, run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    check(cfg, world_size=processes(cfg))
    train_captioner(cfg)


if __name__ == "__main__":
    main()
