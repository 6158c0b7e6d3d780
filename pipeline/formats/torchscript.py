"""The tensors of a TorchScript archive, OpenAI's way of publishing CLIP; its code is not run.

`torch.jit.load` runs what the archive's classes define as `__setstate__`, and TorchScript can write
files. The tensors need none of it: data.pkl names them by the attributes they hang from, and only
the few words that rebuild tensors are understood here.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


class Node:
    """An instance of any class of the archive: its attributes."""


def torchscript_tensors(path: Path) -> dict[str, Tensor]:
    """Dotted name -> tensor. Raises ValueError for an archive that asks for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = _member(archive, root)
            top = _Tensors(io.BytesIO(content), archive, root.removesuffix(".pkl")).load()
        return dict(_named(top, ""))
    except Exception as error:  # whatever the broken part of an archive leads to
        raise ValueError(f"{path} is no readable TorchScript archive: {error!r}") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch never does")
    return archive.read(name)


def _named(node: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(node).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Node):
            yield from _named(value, f"{prefix}{name}.")


class _Tensors(pickle.Unpickler):
    """Understands modules, tensors, and lists of numbers."""

    def __init__(self, source: io.BytesIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(source)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Callable | torch.dtype:
        if module == "__torch__" or module.startswith("__torch__."):
            return Node
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and (name in LISTS or name == "restore_type_tag"):
            return _first
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, saved: Any) -> Tensor:
        """The storage of a key: ("storage", dtype, key, device, number of elements)."""
        _, dtype, key, *_ = saved
        if key not in self.storages:
            data = _member(self.archive, f"{self.folder}/{key}")
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype)
        return self.storages[key]


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)  # raises when it points out of the storage


def _first(value: Any, *_: Any) -> Any:
    return value
