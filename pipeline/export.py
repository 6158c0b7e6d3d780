"""COMMAND: a trained run in the files that other software loads.

    clip-export run=runs/demo format=transformers out=exported    # or python -m pipeline.export
    clip-export run=runs/demo format=open_clip out=exported
    clip-export run=runs/demo format=features format.shards=curated out=features

A model's directory has a README.md, its card. push_to=USER/NAME sends it to the Hugging Face hub,
into a private repository unless private=false; the login is `hf auth login`'s, or HF_TOKEN.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

from omegaconf import DictConfig

from pipeline.command import entry
from pipeline.config import build, check
from pipeline.evals.trained import TrainedClip
from pipeline.formats.model_card import model_card
from pipeline.shards import write_atomically


def export(config: DictConfig) -> Path:
    """Write a checked config's format; returns the directory."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: give a directory")
    written = build(config.format)
    trained = TrainedClip.load(
        config.run,
        checkpoint=config.checkpoint,
        weights=config.weights,
        allow_foreign_targets=config.allow_foreign_targets,
    )
    written.write(trained, out)
    if isinstance(written, Loadable):
        card = model_card(
            trained,
            config.run,
            library=written.library,
            how_to_load=written.how_to_load,
            license=config.license,
        )
        write_atomically(out / "README.md", card.encode())
    elif config.push_to:
        raise ValueError(
            f"push_to={config.push_to}: the hub's models are format=open_clip or "
            "format=transformers"
        )
    if config.push_to:
        push(out, config.push_to, private=config.private)
    return out


@runtime_checkable
class Loadable(Protocol):
    """A format that a library loads as a model."""

    library: str  # the hub's word
    how_to_load: str  # Python, for the card


def push(out: Path, repository: str, *, private: bool) -> None:
    """Send a directory to the hub. Raises ValueError with what the hub answers."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out, commit_message="pairwright export")
    except Exception as error:  # the client's HTTP library, and its errors, differ by version
        raise ValueError(
            f"push_to={repository}: {error}. The export is whole in {out}; `hf auth login`, then "
            "the same command again"
        ) from error


@entry("clip-export", config="export", choices="format")
def main(config: DictConfig) -> None:
    """Check, export, say where."""
    check(config)
    out = export(config)
    for path in sorted(path for path in out.iterdir() if path.is_file()):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
