"""An exponential moving average of weights, whole or in shards: the maths, without a trainer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.distributed import rank


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the whole of what is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; a collective call where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_of(weight: Tensor, like: Tensor) -> Tensor:
    """A float32 copy where `like` is, sharded as it; weight may be whole."""
    weight = weight.detach().to(device=like.device, dtype=torch.float32)
    if isinstance(like, DTensor) and not isinstance(weight, DTensor):
        return distribute_tensor(weight, like.device_mesh, like.placements)
    return weight.clone()


class ExponentialAverage:
    """average <- m * average + (1 - m) * weight, once a step, in float32.

    decay: m, in [0, 1).  final_decay: m rises to it by a half cosine over the run, in [decay, 1]
    (BYOL, arXiv:2006.07733, sec. 3.3; A-CLIP, arXiv:2212.08653: 0.996 to 1); None keeps m constant.
    `weights` are the averages by name. Sharded (FSDP2) parameters have sharded averages: a rank
    averages its own piece, without communication.
    """

    def __init__(self, *, decay: float, final_decay: float | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} is outside [0, 1)")
        if final_decay is not None and not decay <= final_decay <= 1:
            raise ValueError(f"final_decay {final_decay} is outside [decay={decay}, 1]")
        self.decay, self.final_decay = decay, final_decay
        self.weights: dict[str, Tensor] = {}

    def decay_at(self, step: int, total: int) -> float:
        """m of the step with this index, 0 <= step, in a run of `total` steps."""
        if self.final_decay is None:
            return self.decay
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return self.final_decay - (self.final_decay - self.decay) * falling

    def follow(self, named: Mapping[str, nn.Parameter]) -> list[str]:
        """Begin with the parameters that are trained and new; returns the names of those that
        begin again because their shape has changed. Frozen parameters join once they are trained.
        """
        restarted = []
        for name, parameter in named.items():
            average = self.weights.get(name)
            if average is not None and average.shape != parameter.shape:
                restarted.append(name)
            elif average is not None or not parameter.requires_grad:
                continue
            self.weights[name] = copy_of(parameter, parameter)
        return restarted

    @torch.no_grad()
    def update(self, named: Mapping[str, nn.Parameter], *, step: int, total: int) -> None:
        """After the optimizer's step with this index, 0 <= step < total."""
        averages = [local(average) for average in self.weights.values()]
        weights = [local(named[name].detach()).float() for name in self.weights]
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - self.decay_at(step, total))

    def gathered(self) -> dict[str, Tensor]:
        """Whole averages on the CPU of rank 0, nothing elsewhere; every rank must call it."""
        found = {}
        for name, average in self.weights.items():
            complete = whole(average)
            if rank() == 0:
                found[name] = complete.cpu()
        return found

    def place(self, named: Mapping[str, nn.Parameter]) -> None:
        """Averages of a checkpoint (whole, on the CPU) go where the parameters are. A scalar takes
        the shape of its parameter, to which a strategy may have given a dimension.

        Raises ValueError if a name is not among the parameters.
        """
        for name in self.weights.keys() - named.keys():
            raise ValueError(f"the checkpoint averages {name}, which the model does not have")
        placed = {}
        for name, weight in self.weights.items():
            like = named[name]
            scalar = weight.numel() == like.numel() == 1
            placed[name] = copy_of(weight.reshape(like.shape) if scalar else weight, like)
        self.weights = placed
