"""A checkpoint of others, or of ours, as plain tensors: nothing in a file is executed."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pipeline.evals.trained import newest_checkpoint
from pipeline.formats.torchscript import torchscript_tensors

# in a directory, in this order
FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers put the weights
PREFIXES = ("module.", "model.", "_orig_mod.")  # what wrappers put in front of every name


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """name -> tensor, memory-mapped, without the prefixes of wrappers.

    path: a .safetensors file, a torch file of weights (open_clip's and Lightning's checkpoints
    too), OpenAI's TorchScript archive, a directory of open_clip or transformers, or a run directory
    of ours.
    Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a checkpoint file, or the directory of one")
    return _text_at_the_root(_tower_at_the_trunk(_without_prefixes(_tensors(path))))


def _file_in(directory: Path) -> Path:
    for name in FILES:
        if (directory / name).is_file():
            return directory / name
    if (directory / "checkpoints").is_dir():
        return newest_checkpoint(directory)
    raise ValueError(
        f"{directory} holds none of {', '.join(FILES)} and no checkpoints/: give a checkpoint file"
    )


def _tensors(path: Path) -> Mapping[str, Tensor]:
    if path.suffix != ".safetensors" and is_torchscript(path):
        return torchscript_tensors(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file raises whatever its broken part leads to
        raise ValueError(f"{path} is not a readable file of weights: {error!r}") from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:2] == ["constants.pkl"] for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return False


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = dict(weights)
    while True:
        for prefix in PREFIXES:
            if any(name.startswith(prefix) for name in weights):
                # a Lightning checkpoint also holds the objective's own parameters, unprefixed
                weights = {
                    name.removeprefix(prefix): tensor
                    for name, tensor in weights.items()
                    if name.startswith(prefix)
                }
                break
        else:
            return weights


def _tower_at_the_trunk(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Image towers of timm's and EVA's where open_clip has them: those by themselves are at the
    root, those of EVA-CLIP's own files one level up.
    """
    for begin in ("", "visual."):
        if f"{begin}patch_embed.proj.weight" in weights:
            return {
                f"visual.trunk.{name.removeprefix(begin)}" if name.startswith(begin) else name: w
                for name, w in weights.items()
            }
    return dict(weights)


def _text_at_the_root(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's models with a "custom" text tower have it one level down."""
    if not any(name.startswith("visual.") for name in weights):
        return dict(weights)
    return {name.removeprefix("text."): tensor for name, tensor in weights.items()}
