"""COMMAND: a run as a page to look at.

    clip-report run=runs/N    # or python -m pipeline.report

For a run that is going on, was killed or is done; writes runs/N/report.html.
"""

from omegaconf import DictConfig

from pipeline.command import entry
from pipeline.config import check
from pipeline.tracking.page import write_page


@entry("clip-report", config="report")
def main(config: DictConfig) -> None:
    """Check, write, say where."""
    check(config)
    print(write_page(config.run))


if __name__ == "__main__":
    main()
