"""Weights and optimizer state of a ZeRO engine as whole tensors, and back.

The layout is torch's own: what `optimizer.state_dict()` of one process holds. All functions are
collectives: every rank calls them with the same modules. Stages 1 to 3 keep float32 masters of the
trained parameters apart from the parameters, also in float32; here both are read and written.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import rank
from pipeline.trainer.checkpoints import check_names, has_shape

log = logging.getLogger(__name__)

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # deepspeed's words


def gathered(
    parameters: Sequence[nn.Parameter], *, writer: int | None = None
) -> AbstractContextManager:
    """Inside, the parameters are whole; with a writer, its values are everyone's afterwards."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)


def value_of(parameter: nn.Parameter) -> Tensor:
    """The whole parameter, from its float32 master where there is one."""
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter)
    if value is not None:
        return value.detach().clone()
    with gathered([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def set_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a whole parameter, and its master where there is one."""
    with gathered([parameter], writer=0):
        parameter.copy_(value.reshape(parameter.shape))
    _write(parameter, value, None)


def kept_frozen(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that do not learn, by name, before an engine rounds them, which keeps a master of
    none: on rank 0's CPU.
    """
    return {
        name: _on_rank_0(parameter.detach(), parameter.shape)
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def whole_weights(
    module: nn.Module, shapes: Mapping[str, torch.Size], frozen: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """module.state_dict() as one process would give it, on rank 0's CPU. shapes: of its
    parameters.  frozen: see `kept_frozen`.
    """
    parameters = dict(module.named_parameters())

    def whole(name: str, tensor: Tensor) -> Tensor:
        if name in frozen:
            return frozen[name].reshape(shapes[name]) if rank() == 0 else frozen[name]
        if name in parameters:
            return _on_rank_0(value_of(parameters[name]), shapes[name])
        return tensor.detach().cpu().clone()

    return {name: whole(name, tensor) for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_weights(
    module: nn.Module, whole: Mapping[str, Tensor], frozen: dict[str, Tensor], *, strict: bool
) -> None:
    """Into the parameters, their masters, and `frozen`. Raises ValueError for missing or unknown
    names if strict.
    """
    held, parameters = module.state_dict(), dict(module.named_parameters())
    if strict:
        check_names(held, whole)
    for name in [name for name in held if name in whole]:
        if name in frozen:
            frozen[name] = _on_rank_0(whole[name], whole[name].shape)
        if name in parameters:
            set_value(parameters[name], whole[name].to(parameters[name].device))
        else:
            held[name].copy_(whole[name])


def loss_scale(engine: Any) -> dict[str, float]:
    """Where float16's loss scale stands."""
    scaler = engine.optimizer.loss_scaler
    return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def set_loss_scale(engine: Any, state: Mapping[str, float]) -> None:
    """Go on from `loss_scale`."""
    for key, value in state.items():
        setattr(engine.optimizer.loss_scaler, key, value)


def whole_optimizer(
    engine: Any, names: list[list[str]], shapes: Mapping[str, torch.Size]
) -> dict[str, Any]:
    """names: of the parameters in each of the optimizer's groups, in order. shapes: theirs."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return _reshaped(engine.optimizer.state_dict(), [shapes[n] for g in names for n in g])
    _link(engine)
    parameters = dict(engine.module.named_parameters())
    states: dict[int, dict[str, Any]] = {}
    groups, index = [], 0
    for group, members in zip(engine.optimizer.param_groups, names, strict=True):
        numbers = list(range(index, index + len(members)))
        for number, name in zip(numbers, members, strict=True):
            _, state = _flat_of(engine.optimizer, parameters[name])
            states[number] = {
                key: _on_rank_0(safe_get_full_optimizer_state(parameters[name], key), shapes[name])
                if has_shape(key, value)
                # Each parameter counts for itself, or an optimizer that reads it counts them all.
                else copy.deepcopy(value)
                for key, value in state.items()
            }
        groups.append({k: v for k, v in group.items() if k != "params"} | {"params": numbers})
        index += len(members)
    return {"state": {i: s for i, s in states.items() if s}, "param_groups": groups}


@torch.no_grad()
def load_optimizer(engine: Any, names: list[list[str]], content: Mapping[str, Any]) -> None:
    """A flat piece of the engine has one count of steps, that of its first parameter with state.

    Exact for a run's own checkpoint. Where a phase adds parameters (thawed ones, resized tables),
    they start from zero moments with the others' count: Adam's correction of young moments, which
    a process with whole parameters makes, is missing in their first steps. Said in the log.
    """
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 0:
        held = [parameters[name].shape for group in names for name in group]
        engine.optimizer.load_state_dict(_reshaped(content, held))
        return
    members = [parameters[name] for group in names for name in group]
    young = len(members) - len(content["state"])
    if content["state"] and young and rank() == 0:
        log.warning(
            "%d parameters without optimizer state take the others' count of steps: their first "
            "steps are shorter than under trainer=ddp or trainer=fsdp",
            young,
        )
    for index, state in content["state"].items():
        flat, held = _flat_of(engine.optimizer, members[index])
        for key, value in state.items():
            fresh = torch.zeros_like(flat) if has_shape(key, value) else copy.deepcopy(value)
            held.setdefault(key, fresh)
    _link(engine)
    for index, state in content["state"].items():
        for key, value in state.items():
            if has_shape(key, value):
                _write(members[index], value, key)
    for group, saved in zip(engine.optimizer.param_groups, content["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _on_rank_0(value: Tensor, shape: torch.Size) -> Tensor:
    """Whole tensors do not fit everywhere at once: the other ranks keep none."""
    return value.reshape(shape).cpu().clone() if rank() == 0 else torch.empty(0)


def _link(engine: Any) -> None:
    """Stages 1 and 2 link parameters to optimizer state after the first group's first step, when
    the other groups have none, and never again.
    """
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _reshaped(content: Mapping[str, Any], shapes: list[torch.Size]) -> dict[str, Any]:
    states = {
        index: {k: v.reshape(shapes[index]) if has_shape(k, v) else v for k, v in state.items()}
        for index, state in content["state"].items()
    }
    return {**content, "state": states}


def _flat_of(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Any]]:
    """The flat float32 piece of this rank for the parameter's group, and its optimizer state."""
    if hasattr(parameter, "ds_id"):
        group, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
    else:
        flat = next(
            flat
            for flat, members in zip(
                optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
            )
            if any(member is parameter for member in members)
        )
    return flat, optimizer.optimizer.state[flat]


def _write(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """The master (key=None) or an entry of the optimizer's state, this rank's part of it."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # The full setters of stage 3 fail where the last piece is padded.
    size, place = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
    flat = value.flatten()[place * size : (place + 1) * size]
    piece = F.pad(flat, (0, size - flat.numel()))
    if key is None:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, key)
