"""A step on each strategy, as run by every process of a test, and the single process it must equal.

Letters: B pairs of a rank.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses.features import PairFeatures
from pipeline.losses.objective import Objective
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models.clip import CLIP
from pipeline.models.text import TextTransformer
from pipeline.models.vit import VisionTransformer
from pipeline.optim.lamb import Lamb
from pipeline.tokens.random import RandomTokens
from pipeline.trainer.cached_step import CachedContrastiveStep, encoded, formula, scalars
from pipeline.trainer.strategies.ddp import Replicated
from pipeline.trainer.strategies.fsdp import FullySharded, shard
from pipeline.trainer.strategies.scalars import widen_scalars
from pipeline.trainer.strategies.single import SingleProcess
from pipeline.trainer.strategies.zero import (
    Zero,
    prepare_cpu,
    register_loss_parameters,
    use_pieces,
    zero_options,
)
from pipeline.trainer.strategies.zero_state import value_of

BATCH = 8  # no multiple of 3, so that the last micro-batch is smaller
MICRO_BATCHES = (1, 3, BATCH)
LENGTH, START, END = 9, 28, 29
DROPOUT = 0.2


class Sent(TorchDispatchMode):
    """Counts the collectives that python code starts (not those of DistributedDataParallel)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


class Slanted(nn.Module):
    """A term with parameters of its own, one of them without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.direction = nn.Parameter(torch.linspace(-1, 1, 8))
        self.softmax = SoftmaxLoss()

    def forward(self, features: PairFeatures) -> Tensor:
        slant = (features.image_embed @ self.direction).mean()
        return F.softplus(self.gain) * self.softmax(features) + slant


class Trained(nn.Module):
    """What a strategy wraps. Dropout in every block, and tokens are dropped by index."""

    def __init__(
        self, dtype: torch.dtype, *, dropout: float = DROPOUT, checkpointing: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"width": 16, "layers": 2, "heads": 2, "activation_checkpointing": checkpointing}
        self.model = CLIP(
            image=VisionTransformer(image_size=8, patch_size=2, **sizes),
            text=TextTransformer(vocab_size=30, context_length=LENGTH, **sizes),
            embed_dim=8,
            # A mild scale keeps gradients near 1, where float32 is good to 1e-6.
            init_logit_scale=3.0,
        )
        for tower in (self.model.image, self.model.text):
            for block in tower.transformer.blocks:
                block.mlp.activation = nn.Sequential(block.mlp.activation, nn.Dropout(dropout))
        self.objective = Objective(terms={"slanted": Slanted()})
        self.scalars = scalars(self.model, self.objective)
        self.formula = formula(self.objective)
        self.to(dtype)

    def forward(self, *chunk: Tensor) -> Any:
        return encoded(self.model, self.objective, chunk, self.scalars)


def batch_of(index: int, dtype: torch.dtype) -> list[Tensor]:
    """Rank `index`'s pairs with dropped tokens: half of the patches, three of a caption's words."""
    generator = torch.Generator().manual_seed(10 + index)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, START, (BATCH, LENGTH), generator=generator)
    tokens[:, 0], tokens[:, -1] = START, END
    image_kept = RandomTokens(keep=0.5).kept(BATCH, 16, generator)
    words = 1 + torch.rand(BATCH, LENGTH - 2, generator=generator).argsort(1)[:, :4].sort(1).values
    ends = torch.tensor([[0, LENGTH - 1]]).expand(BATCH, 2)
    text_kept = torch.cat([ends[:, :1], words, ends[:, 1:]], dim=1)
    return [images.to(dtype), tokens, image_kept, text_kept]


def oracle(world: int, dtype: torch.dtype, micro: int) -> tuple[dict[str, Tensor], float]:
    """Gradients and loss of all pairs in one graph, the loss written out; each rank's micro-batches
    draw their dropout in order.
    """
    trained = Trained(dtype)
    images, texts = [], []
    for index in range(world):
        torch.manual_seed(100 + index)
        for chunk in zip(*(rows.split(micro) for rows in batch_of(index, dtype)), strict=True):
            image_embed, text_embed = trained.model(*chunk)
            images.append(image_embed)
            texts.append(text_embed)
    image_embed, text_embed = torch.cat(images), torch.cat(texts)
    logits = trained.model.log_logit_scale.exp() * image_embed @ text_embed.T
    to_texts, to_images = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    term = trained.objective.terms["slanted"]
    softmax = -(to_texts + to_images).mean() / 2
    loss = F.softplus(term.gain) * softmax + (image_embed @ term.direction).mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in trained.named_parameters()}, loss.item()


def step_of(trained: Trained, adapter: SingleProcess, micro: int) -> CachedContrastiveStep:
    return CachedContrastiveStep(
        encode=adapter.encode,
        loss_scalars=trained.model.loss_scalars,
        objective=trained.formula,
        micro_batch_size=micro,
        backward=adapter.backward,
        session=adapter.session,
    )


def whole_gradients(trained: Trained) -> dict[str, Tensor]:
    shapes = {name: p.shape for name, p in Trained(torch.float32).named_parameters()}
    return {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
        .clone()
        .reshape(shapes[name])
        for name, p in trained.named_parameters()
    }


def two_steps(trained: Trained, adapter: SingleProcess, micro: int, index: int) -> list[Any]:
    """Two, since DistributedDataParallel rebuilds its buckets after the first."""
    dtype = next(trained.parameters()).dtype
    step, results = step_of(trained, adapter, micro), []
    for _ in range(2):
        trained.zero_grad(set_to_none=True)
        torch.manual_seed(100 + index)
        with Sent() as sent:
            logged = step(*batch_of(index, dtype))
        gradients = whole_gradients(trained)
        results.append({"gradients": gradients, "loss": logged["loss"].item(), "sent": sent.counts})
    return results


def counting(trained: Trained) -> tuple[DistributedDataParallel, list[int]]:
    """The wrapped module, and a list that grows by the size of each reduced parameter."""
    # Small buckets, so that there are several.
    wrapped = DistributedDataParallel(trained, bucket_cap_mb=0.005)
    reduced: list[int] = []

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.extend(parameter.numel() for parameter in bucket.parameters())
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, hook)
    return wrapped, reduced


def run_ddp(index: int, dtype: torch.dtype, micro: int) -> dict[str, Any]:
    trained = Trained(dtype)
    wrapped, reduced = counting(trained)
    steps = two_steps(trained, Replicated(model=wrapped), micro, index)
    return {"steps": steps, "reduced": sum(reduced)}


def run_fsdp(
    index: int,
    dtype: torch.dtype,
    micro: int,
    reduce_gradients: str = "once",
    checkpointing: bool = False,
) -> dict[str, Any]:
    trained = Trained(dtype, checkpointing=checkpointing)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    widen_scalars(trained)
    shard(trained, trained.model, mesh)
    adapter = FullySharded(model=trained, reduce_gradients=reduce_gradients)
    results = {"steps": two_steps(trained, adapter, micro, index)}
    adapter.clip(0.01)
    clipped = whole_gradients(trained)
    norm = torch.stack([gradient.norm() for gradient in clipped.values()]).norm()
    return results | {"norm": adapter.outcome()[0], "clipped": norm.item()}


def engine_of(
    trained: Trained,
    stage: int,
    *,
    offload: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    **config: Any,
) -> Any:
    prepare_cpu()
    import deepspeed

    options = zero_options(stage, offload=offload, on_cpu=True) | config
    # Small buckets, so that there are several, and in stage 3 every parameter in pieces.
    options["zero_optimization"] |= {
        "reduce_bucket_size": 4000,
        "stage3_param_persistence_threshold": 0,
    }
    engine, *_ = deepspeed.initialize(
        model=trained,
        optimizer=optimizer or torch.optim.SGD(trained.parameters(), lr=1.0),
        config={"train_micro_batch_size_per_gpu": 1, **options},
        dist_init_required=False,
    )
    if stage == 3:
        register_loss_parameters(trained)
    use_pieces(engine)
    return engine


# An eps that is no smaller than most gradients, so that rounding does not turn a step's sign; rates
# by tower and depth, so that there are several groups.
LAMB = Lamb(
    lr=0.05,
    eps=1e-2,
    weight_decay=0.1,
    max_coeff=1.5,
    towers={"image": {"layer_decay": 0.5}, "text": {"lr": 0.02}},
)


def run_lamb(index: int, stage: int | None, *, offload: bool = False) -> dict[str, Tensor]:
    """Weights after three steps of LAMB; stage None: DistributedDataParallel."""
    trained = Trained(torch.float32)
    if stage is None:
        shapes = {name: parameter.shape for name, parameter in trained.named_parameters()}
        optimizer = LAMB.make(trained)
        adapter: Any = Replicated(model=DistributedDataParallel(trained))
        update = optimizer.step
    else:
        shapes = widen_scalars(trained)
        engine = engine_of(trained, stage, offload=offload, optimizer=LAMB.make(trained))
        adapter = Zero(model=engine, backward=engine.backward, reduce_gradients="once")
        update = engine.step
    step = step_of(trained, adapter, 3)
    for number in range(3):
        torch.manual_seed(100 + index + 10 * number)
        if stage is None:
            trained.zero_grad(set_to_none=True)
        step(*batch_of(index, torch.float32))
        update()
    if stage is None:
        return {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    return weights_of(trained, shapes)


def run_zero(
    index: int,
    stage: int,
    micro: int,
    *,
    reduce_gradients: str = "once",
    offload: bool = False,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Two steps, of rate 0 and 1: the weights' change by SGD is then the second's gradient."""
    trained = Trained(torch.float32, checkpointing=checkpointing)
    shapes = widen_scalars(trained)
    engine = engine_of(trained, stage, offload=offload)
    adapter = Zero(model=engine, backward=engine.backward, reduce_gradients=reduce_gradients)
    return zero_steps(index, trained, shapes, adapter, micro)


def weights_of(trained: Trained, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Of every rank, from the float32 masters."""
    values = {name: value_of(parameter) for name, parameter in trained.named_parameters()}
    return {name: value.reshape(shapes[name]) for name, value in values.items()}


def zero_steps(
    index: int, trained: Trained, shapes: dict[str, torch.Size], adapter: Zero, micro: int
) -> dict[str, Any]:
    before, step = weights_of(trained, shapes), step_of(trained, adapter, micro)
    for rate in (0.0, 1.0):
        adapter.model.optimizer.param_groups[0]["lr"] = rate
        torch.manual_seed(100 + index)
        with Sent() as sent:
            logged = step(*batch_of(index, torch.float32))
        adapter.clip(None)
        adapter.model.step()
    after = weights_of(trained, shapes)
    gradients = {name: before[name] - after[name] for name in before}
    result = {"gradients": gradients, "loss": logged["loss"].item(), "sent": sent.counts}
    return {"steps": [result], "outcome": adapter.outcome()}


def join(index: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(index), "RANK": str(index), "WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=index, world_size=world
    )


def leave(index: int, directory: str, results: dict[Any, Any]) -> None:
    torch.save(results, Path(directory) / f"{index}.pt")
    dist.destroy_process_group()
