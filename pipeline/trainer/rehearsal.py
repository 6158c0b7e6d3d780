"""A run before its first step: what its phases are made of is built on shapes alone, so that a
mistake in the last phase is found before the first is paid for.
"""

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from pipeline.config import build
from pipeline.cost.optimizer import Shrunk
from pipeline.cost.phase import shapes_of
from pipeline.losses.features import PairFeatures
from pipeline.losses.objective import Objective
from pipeline.models.clip import CLIP
from pipeline.models.freeze import freeze
from pipeline.phases import Phase, phases
from pipeline.trainer.attentive import AttentiveModule, module_class, refuse_without_average
from pipeline.trainer.checkpoints import find_newest, step_of
from pipeline.trainer.identity import run_directory
from pipeline.trainer.strategies.fsdp import FullyShardedStrategy
from pipeline.trainer.strategies.zero import ZeroStrategy, refuse_whole_parameter_rules


def rehearse(cfg: DictConfig) -> None:
    """Raise ValueError, with the phase's name, for what would end the run in a phase that is not
    done yet.

    Price: seconds, no weights; each phase's tokenizer and data are opened once more.
    """
    done = step_of(find_newest(run_directory(cfg) / "checkpoints"))
    plan = [phase for phase in phases(cfg) if phase.end_step > done]
    rehearse_shapes(plan)
    for number, phase in enumerate(plan):
        with _named(phase):
            _try_text(phase.config)
            if not any(_same_data(phase, before) for before in plan[:number]):
                _open_data(phase)


def rehearse_shapes(plan: Sequence[Phase]) -> None:
    """The same as far as it needs no file, for these phases. Raises OmegaConf's errors for values
    that are still missing.
    """
    before: tuple[DictConfig, nn.Module] | None = None
    for phase in plan:
        with _named(phase):
            now = phase.config, _try_parts(phase.config)
            if before is not None:
                _refuse_other_state(before, now)
        before = now


@contextmanager
def _named(phase: Phase) -> Iterator[None]:
    """A user's mistake says in which phase it is."""
    try:
        yield
    except ValueError as error:
        if not phase.name or isinstance(error, OmegaConfBaseException):
            raise
        raise ValueError(f"phase {phase.name}: {error}") from error


def _shapes(cfg: DictConfig) -> nn.Module:
    try:
        return shapes_of(cfg)
    except (InstantiationException, OmegaConfBaseException):
        # a model of other people's that needs its numbers, or has other parts
        model = build(cfg.model)
    freeze(model, cfg.frozen)
    return model


def _try_parts(cfg: DictConfig) -> nn.Module:
    model, transform = _shapes(cfg), build(cfg.transform)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"frozen: {list(cfg.frozen)} leaves no parameter that learns")
    _refuse_wrong_sizes(cfg, model, transform)
    policy = build(cfg.image_tokens) if cfg.image_tokens else None
    attentive = issubclass(module_class(model, transform, policy), AttentiveModule)
    if policy is not None:
        patches = model.image.num_tokens
        policy.num_kept(patches)
        if hasattr(policy, "from_noise"):
            policy.from_noise(torch.zeros(1, patches))
    if cfg.text_tokens:
        _refuse_other_endings(cfg.tokenizer)
    _try_loss(model, Objective(terms=build(cfg.loss), weights=dict(cfg.loss_weights)))
    build(cfg.schedule)
    if cfg.ema:
        build(cfg.ema)
    _refuse_wrong_strategy(cfg, build(cfg.optimizer).make(Shrunk(model)), attentive=attentive)
    return model


def _refuse_wrong_sizes(cfg: DictConfig, model: nn.Module, transform: Any) -> None:
    given, needed = getattr(transform, "image_size", None), model.image.image_size
    if given not in (None, needed):
        raise ValueError(
            f"transform.image_size={given} is not the image tower's {needed}: leave it out, it "
            "follows model.image.image_size"
        )
    key = "text_tokens.context_length" if cfg.text_tokens else "tokenizer.context_length"
    length, longest = OmegaConf.select(cfg, key), model.text.context_length
    if length is not None and length > longest:
        raise ValueError(
            f"{key}={length} is above the {longest} positions of the text tower: raise "
            "model.text.context_length, or lower it"
        )


def _refuse_other_endings(tokenizer: DictConfig) -> None:
    """Text policies find the end of a caption at its largest id."""
    target = pkgutil.resolve_name(tokenizer._target_)
    if not getattr(target, "ends_with_largest_id", False):
        raise ValueError(
            f"text_tokens: {tokenizer._target_} does not say that its end of text is its largest "
            "id (ends_with_largest_id = True), where a caption is cut: set text_tokens=none, or "
            "tokenizer=clip"
        )


def _try_loss(model: nn.Module, objective: Objective) -> None:
    """Each term on two pairs, unless it wants a GPU or a model that gives more of a pair."""
    if type(model).forward is not CLIP.forward:
        return
    values = {name: torch.zeros(p.shape) for name, p in model.loss_parameters().items()}
    rows = torch.zeros(2, model.embed_dim)
    features = PairFeatures(
        image_embed=rows, text_embed=rows, metric=model.metric, **model.loss_scalars(values)
    )
    for term in objective.terms.values():
        if getattr(term, "backend", None) != "triton":
            term(features)


def _refuse_wrong_strategy(
    cfg: DictConfig, optimizer: torch.optim.Optimizer, *, attentive: bool
) -> None:
    node = OmegaConf.select(cfg, "trainer.strategy")
    strategy = pkgutil.resolve_name(node._target_) if OmegaConf.is_dict(node) else None
    sharded, zero = (
        isinstance(strategy, type) and issubclass(strategy, known)
        for known in (FullyShardedStrategy, ZeroStrategy)
    )
    stage = node.stage if zero else 0
    if attentive:
        refuse_without_average(averaged=bool(cfg.ema), whole=not sharded and stage < 3)
    if isinstance(optimizer, torch.optim.Adafactor) and (sharded or stage):
        raise ValueError(
            "optimizer: Adafactor looks at whole parameters, and FSDP2 and ZeRO give it pieces of "
            "them: use trainer=ddp, or optimizer=adamw or lamb"
        )
    if stage:
        refuse_whole_parameter_rules(optimizer)
    if stage == 3 and cfg.ema:
        raise ValueError(
            "ema: ZeRO-3 keeps no parameter whole or in a shard of its own: set ema=none, or "
            "use trainer=ddp, fsdp, deepspeed_1 or deepspeed_2"
        )


def _state_of(optimizer: Any, model: nn.Module) -> dict[str, set[str]]:
    """What a step leaves of each parameter that learns: names of tensors, by name."""
    copy = Shrunk(model)
    made = optimizer.make(copy)
    for parameter in copy.small.values():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    made.step()
    return {name: set(made.state[p]) for name, p in copy.small.items() if p in made.state}


def _refuse_other_state(
    before: tuple[DictConfig, nn.Module], now: tuple[DictConfig, nn.Module]
) -> None:
    """Moments go along to another optimizer only if it keeps the same ones."""
    old, new = (cfg.optimizer._target_ for cfg, _ in (before, now))
    if now[0].optimizer_state == "reset" or old == new:
        return
    kept, wanted = (_state_of(build(cfg.optimizer), model) for cfg, model in (before, now))
    if any(kept[name] != wanted[name] for name in kept.keys() & wanted.keys()):
        raise ValueError(
            f"optimizer: {new} cannot go on with what {old} kept in the phase before: set "
            "optimizer_state=reset in this phase"
        )


def _try_text(cfg: DictConfig) -> None:
    """A caption as the text tower will see it."""
    tokens = build(cfg.tokenizer)(["a caption"])
    if cfg.text_tokens:
        build(cfg.text_tokens).reduce(tokens, torch.zeros(tokens.shape))


def _same_data(phase: Phase, other: Phase) -> bool:
    ours, theirs = (
        (OmegaConf.to_container(p.config.data, resolve=True), p.config.global_batch_size)
        for p in (phase, other)
    )
    return ours == theirs


def _open_data(phase: Phase) -> None:
    """As one process would: shards that are missing or too few are named."""
    cfg = phase.config
    data = build(cfg.data).for_run(
        transform=build(cfg.transform), tokenizer=build(cfg.tokenizer), phase=phase, seed=cfg.seed
    )
    data.open(rank=0, world_size=1)
