"""COMMAND: a trained run in the files that other software loads.

python -m pipeline.export run=runs/demo format=transformers out=exported
python -m pipeline.export run=runs/demo format=open_clip out=exported
python -m pipeline.export run=runs/demo format=features format.shards=curated out=features
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from pipeline.config import CONF, build, check, user_errors
from pipeline.evals.trained import TrainedClip


def export(config: DictConfig) -> Path:
    """Write a checked config's format; returns the directory."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: give a directory")
    written = build(config.format)
    trained = TrainedClip.load(config.run, checkpoint=config.checkpoint, weights=config.weights)
    written.write(trained, out)
    return out


@hydra.main(version_base="1.3", config_path=CONF, config_name="export")
def main(config: DictConfig) -> None:
    """Check, export, say where."""
    with user_errors("clip-export"):
        check(config)
        out = export(config)
    for path in sorted(path for path in out.iterdir() if path.is_file()):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
