"""COMMAND: a run as a page to look at. `python -m pipeline.report run=runs/N`.

For a run that is going on, was killed or is done; writes runs/N/report.html.
"""

import hydra
from omegaconf import DictConfig

from pipeline.config import CONF, check, user_errors
from pipeline.tracking.page import write_page


@hydra.main(version_base="1.3", config_path=CONF, config_name="report")
def main(config: DictConfig) -> None:
    """Check, write, say where."""
    with user_errors("clip-report"):
        check(config)
        print(write_page(config.run))


if __name__ == "__main__":
    main()
