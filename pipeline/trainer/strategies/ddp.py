"""DistributedDataParallel: whole parameters on each process, one reduction of gradients a step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.trainer.strategies.single import SingleProcess


class Replicated(SingleProcess):
    """All forwards and all backwards but the last run inside no_sync().

    DistributedDataParallel arms its reducer at the end of a forward outside no_sync(), so a step of
    several forwards would reduce several times; here the reducer is armed right before the one
    backward that reduces.
    """

    model: DistributedDataParallel

    def __init__(
        self,
        *,
        model: DistributedDataParallel,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        super().__init__(model=model, backward=backward)

    def encode(self, *chunk: Tensor | None) -> Any:
        with self.model.no_sync():
            return self.model(*chunk)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if last:
            self.model.reducer._rebuild_buckets()
            self.model.reducer.prepare_for_backward(
                [loss] if self.model.find_unused_parameters else []
            )
            self._backward(loss)
        else:
            with self.model.no_sync():
                self._backward(loss)
