"""The state of every random source a tower may draw from, so that a forward can be run again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Python's, numpy's and torch's default generators, and that of the accelerator.

    A generator that a tower owns is not in it: it would have to draw from one of these.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """As it is now. device: where the towers run; its generator counts unless it is the CPU's.

        Reads the accelerator's generator on the host: no wait for the device.
        """
        on_accelerator = device.type != "cpu"
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            cpu=torch.get_rng_state(),
            device=device,
            accelerator=torch.get_device_module(device).get_rng_state(device)
            if on_accelerator
            else None,
        )

    def restore(self) -> None:
        """What is drawn next is what was drawn after `of`."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what followed `of`; the sources then go on as if nothing had been drawn."""
        outside = RandomState.of(self.device)
        self.restore()
        try:
            yield
        finally:
            outside.restore()
