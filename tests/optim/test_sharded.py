"""Optimizers and averages on FSDP2's shards, two processes, against whole parameters in one."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.models.clip import CLIP
from pipeline.optim.adamw import AdamW
from pipeline.optim.average import ExponentialAverage, local, whole
from pipeline.optim.lamb import Lamb
from pipeline.optim.muon import Muon, is_hidden_matrix
from tests.optim.small_model import gradients, tiny

WORLD = 2


def steps_of(name: str, sharded: bool) -> tuple[CLIP, ExponentialAverage]:
    """Three steps of an optimizer with a moving average, on whole or on sharded parameters."""
    torch.manual_seed(0)
    model = tiny()
    given = {step: gradients(model, step) for step in range(3)}
    if sharded:
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(model, mesh=mesh, ignored_params={model.log_logit_scale})
    makers = {"adamw": AdamW, "lamb": Lamb, "muon": Muon}
    optimizer = makers[name](lr=0.01).make(model)
    average, named = ExponentialAverage(decay=0.5), dict(model.named_parameters())
    average.follow(named)
    for step in range(3):
        for parameter_name, parameter in model.named_parameters():
            gradient = given[step][parameter_name]
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
        average.update(named, step=step, total=3)
    return model, average


def on_shards(index: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=index, world_size=WORLD
    )
    found = {}
    for name in ("adamw", "lamb", "muon"):
        model, average = steps_of(name, sharded=True)
        assert isinstance(average.weights["image.position"], DTensor)
        weights = {n: whole(p.detach()) for n, p in model.named_parameters()}
        box = [average.gathered()]
        complete = box[0]
        dist.broadcast_object_list(box)  # what every rank reads from the checkpoint
        again = ExponentialAverage(decay=0.5)
        again.weights = box[0]
        again.place(dict(model.named_parameters()))
        same = all(
            torch.equal(local(again.weights[n]), local(w)) for n, w in average.weights.items()
        )
        found[name] = {"weights": weights, "average": complete, "reloaded": same}
    torch.save(found, Path(directory) / f"{index}.pt")
    dist.destroy_process_group()


def test_sharded_parameters_step_and_average_as_whole_ones(tmp_path: Path) -> None:
    mp.spawn(on_shards, args=(os.fspath(tmp_path),), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{index}.pt") for index in range(WORLD))
    torch.manual_seed(0)
    start = {name: p.detach() for name, p in tiny().named_parameters()}
    for name in ("adamw", "lamb", "muon"):
        model, average = steps_of(name, sharded=False)
        for n, parameter in model.named_parameters():
            moved = (parameter.detach() - start[n]).norm()
            # Muon's iteration is in bfloat16: another order of sums moves 2 % of an update
            tolerance = 0.05 if name == "muon" and is_hidden_matrix(n, parameter) else 1e-4
            ours = first[name]["weights"][n]
            assert (ours - parameter.detach()).norm() <= tolerance * moved, (name, n)
            assert (first[name]["average"][n] - average.weights[n]).norm() <= tolerance * moved
        assert first[name]["reloaded"] and second[name]["reloaded"]
        assert second[name]["average"] == {}
