"""Models that are built before there is memory for their weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, and their buffers filled.

    Fixed tables are buffers, so nothing but weights is left to be set. Holds one parameter at a
    time, and draws nothing from torch's global generator.
    """
    register = nn.Module.register_parameter
    made = WeakTensorKeyDictionary()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in made:  # one that several modules share stays one
                made[parameter] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            parameter = made[parameter]
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
