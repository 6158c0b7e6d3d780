"""FSDP2: parameters, gradients and optimizer state in pieces, one on each process.

Checkpoints are those of one process: whole tensors, written by rank 0.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pipeline.trainer.checkpoints import check_names, has_shape
from pipeline.trainer.strategies.blocks import blocks
from pipeline.trainer.strategies.scalars import widen_scalars
from pipeline.trainer.strategies.single import Reduce, SingleProcess, check_reduce

_AS_IT_IS = MixedPrecisionPolicy()


class FullySharded(SingleProcess):
    """reduce_gradients: "once" a step, which holds a process's whole gradient until then; or at
    "each" micro-batch, which holds only pieces and sends as often.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        backward: Callable[[Tensor], None] = Tensor.backward,
        reduce_gradients: Reduce = "once",
    ) -> None:
        super().__init__(model=model, backward=backward)
        self.reduce_gradients = reduce_gradients

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_requires_gradient_sync(last or self.reduce_gradients == "each")
        self.model.set_is_last_backward(last)
        self._backward(loss)

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = super()._total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard(
    module: nn.Module, model: nn.Module, mesh: DeviceMesh, *, gather_bfloat16: bool = False
) -> None:
    """Cut `module` into pieces: each block of `model`, each of its towers, and the rest."""
    # It says that in-place operations on a tower's output would be wrong; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # Inputs stay as they are: the residual stream is wider than the weights.
    bfloat16 = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=bfloat16 if gather_bfloat16 else _AS_IT_IS)
    for tower in model.children():
        if any(True for _ in tower.children()):
            fully_shard(tower, mesh=mesh)
    fully_shard(module, mesh=mesh)


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints that any strategy reads.

    reduce_gradients: see `FullySharded`.  gather_bfloat16: send the blocks' weights in half the
    bytes; only with trainer.precision=bf16-mixed, where products are computed in it anyway (the
    weights of their norms are rounded too).
    """

    def __init__(
        self,
        *,
        reduce_gradients: Reduce = "once",
        gather_bfloat16: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        check_reduce(reduce_gradients)
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )
        self.reduce_gradients, self.gather_bfloat16 = reduce_gradients, gather_bfloat16
        self._shapes: dict[str, torch.Size] = {}

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def prepare(self, module: pl.LightningModule) -> None:
        """Cut it; called by the module's configure_model. Does nothing a second time."""
        if not isinstance(module, FSDPModule):
            self._shapes = widen_scalars(module)
            mesh = self.device_mesh["data_parallel"]
            shard(module, module.model, mesh, gather_bfloat16=self.gather_bfloat16)
            if any(parameter.is_meta for parameter in module.model.parameters()):
                self._fill(module)

    @torch.no_grad()
    def _fill(self, module: pl.LightningModule) -> None:
        """Give a model that was built without weights its first ones, from rank 0, which alone
        makes them whole; or none, where a checkpoint is to be loaded.
        """
        model = module.model
        tables = {name: table.clone() for name, table in model.named_buffers()}
        model.to_empty(device=self.root_device)
        for name, table in tables.items():
            model.get_buffer(name).copy_(table)
        if module.first_weights is None:
            return
        whole, problem = {}, None
        if self.is_global_zero:
            try:
                whole = module.first_weights().state_dict()
            except ValueError as error:
                problem = str(error)
        problem = self.broadcast(problem)
        if problem is not None:  # the others would wait for ever
            raise ValueError(problem)
        for name, held in model.state_dict().items():
            value = whole[name] if self.is_global_zero else torch.empty(held.shape)
            value = value.reshape(held.shape).to(held.device, held.dtype)
            if isinstance(held, DTensor):
                held.copy_(distribute_tensor(value, held.device_mesh, held.placements))
            else:
                dist.broadcast(value, 0)
                held.copy_(value)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def _whole(self, name: str, value: Any) -> Any:
        """A tensor of a parameter's shape, on rank 0's CPU; a collective where it is in pieces."""
        if isinstance(value, DTensor):
            whole = value.full_tensor().reshape(self._shapes[name])
            return whole.cpu() if self.is_global_zero else torch.empty(0)
        return value.cpu() if isinstance(value, Tensor) else value

    @staticmethod
    def _piece(like: Tensor, value: Tensor) -> Tensor:
        """What `like` holds of a whole tensor."""
        if not isinstance(like, DTensor):
            return value
        whole = value.reshape(like.shape).to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        whole = {n: self._whole(n, t) for n, t in self.lightning_module.state_dict().items()}
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = _inner(optimizer)
        content, names = optimizer.state_dict(), self._names(optimizer)
        states = {
            index: {key: self._whole(names[index], value) for key, value in state.items()}
            for index, state in content["state"].items()
        }
        return {**content, "state": states} if self.is_global_zero else {}

    def _names(self, optimizer: Optimizer) -> list[str]:
        by_parameter = {p: name for name, p in self.lightning_module.named_parameters()}
        return [by_parameter[p] for group in optimizer.param_groups for p in group["params"]]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Mapped, not read: a process touches its own pieces."""
        path = self.broadcast(checkpoint_path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        whole, held = checkpoint["state_dict"], self.lightning_module.state_dict()
        if strict:
            check_names(held, whole)
        for name in held.keys() & whole.keys():
            held[name].copy_(self._piece(held[name], whole[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint["optimizer_states"]  # none after optimizer_state=reset
        for optimizer, content in zip(self.optimizers, saved, strict=bool(saved)):
            optimizer = _inner(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {
                index: {
                    key: self._piece(parameters[index], value) if has_shape(key, value) else value
                    for key, value in state.items()
                }
                for index, state in content["state"].items()
            }
            optimizer.load_state_dict({**content, "state": states})


def _inner(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
