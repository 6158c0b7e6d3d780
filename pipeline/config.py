"""The closed root schemas of the commands, and the check that runs before anything is built.

A component is a plain class chosen by `_target_`; its constructor's signature is its schema.
`problems` compares
every node of a composed config with that signature and reports all mistakes at once, with their
paths; nothing
is built for it. Cross-field arithmetic (batch sizes, lengths) is checked by `batch_problems`.
"""

import contextlib
import inspect
import logging
import os
import pkgutil
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from pipeline.phases import phase_config, phase_problems
from pipeline.targets import foreign_targets

# Absolute: Hydra resolves a relative config_path against the caller, which fails in a console
# script.
CONF = str(Path(__file__).resolve().parents[1] / "conf")

MISSING_WORD = "missing; give it on the command line as"
SCALARS = {int, float, bool, str}


@dataclass
class TrainConfig:
    """`python -m pipeline.train`: everything a run is."""

    name: str = MISSING  # the run: its folder under runs_dir, its W&B id; the same name resumes
    runs_dir: str = "runs"
    seed: int = 0
    samples_seen: int = MISSING  # training length in image-text pairs
    global_batch_size: int = MISSING  # pairs per optimizer step, all processes
    micro_batch_size: int | None = None  # pairs per process per forward; null: the local batch
    gradient_clip_norm: float | None = None
    compile_towers: bool = False  # torch.compile for each transformer block: a minute at the start
    # highest, high (TensorFloat-32 on GPUs since A100) or medium, torch's words: changes the
    # rounding of float32 products
    float32_matmul_precision: str = "highest"
    max_skipped_steps: int = 10  # in a row, their gradient not finite; one more ends the run
    log_every_steps: int = 10
    checkpoint_every_steps: int = 100
    keep_checkpoints: int = 2
    recipe_info: dict[str, str] = field(default_factory=dict)  # source, expected result, price
    # changes of this config, one after the other; their samples_seen add up (pipeline/phases.py)
    phases: dict[str, Any] = field(default_factory=dict)
    # changes made last, in each phase: what debug=tiny makes a whole recipe small with
    every_phase: dict[str, Any] | None = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)  # parameters that do not learn: image.*
    optimizer_state: str = "keep"  # keep | reset, where a phase begins
    data: Any = MISSING
    tokenizer: Any = MISSING
    transform: Any = MISSING
    model: Any = MISSING
    init: Any = None  # where the first weights come from; null: from the seed
    image_tokens: Any = None  # token policy of the image tower, off in evaluation
    text_tokens: Any = None  # token policy of the text tower, off in evaluation
    loss: dict[str, Any] = field(default_factory=dict)  # terms by name
    loss_weights: dict[str, float] = field(default_factory=dict)
    optimizer: Any = MISSING
    schedule: Any = MISSING
    ema: Any = None  # a moving average of the weights beside the run
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)  # what watches the run, by name
    tracking: dict[str, Any] = field(default_factory=dict)
    allow_foreign_targets: bool = False  # whether a config may call what is not ours


@dataclass
class TrainCaptionerConfig:
    """`python -m pipeline.train_captioner`: a captioner on a proxy's image tower."""

    name: str = MISSING  # the run: its folder under runs_dir; the same name resumes
    runs_dir: str = "runs"
    seed: int = 0
    run: str = MISSING  # run directory of the proxy
    samples_seen: int = MISSING  # training length in image-text pairs
    global_batch_size: int = MISSING  # pairs per optimizer step, all processes
    gradient_clip_norm: float | None = None
    log_every_steps: int = 10
    checkpoint_every_steps: int = 100
    keep_checkpoints: int = 2
    image_drop: float = MISSING  # share of pairs that see no image, for guidance
    train_image: bool = False  # whether the proxy's tower learns too
    data: Any = MISSING
    image: Any = None  # null: the proxy's, as the next two
    tokenizer: Any = None
    transform: Any = None
    decoder: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    allow_foreign_targets: bool = False  # whether a config may call what is not ours


@dataclass
class EvaluateConfig:
    """`python -m pipeline.evaluate`: a finished run -> named numbers."""

    run: str = MISSING  # run directory, e.g. runs/demo
    checkpoint: str | None = None  # null: the newest of the run
    weights: str = "trained"  # trained | ema: the run's moving average
    out: str | None = None  # null: <run>/eval
    accelerator: str = "auto"
    devices: int = 1  # processes on a node; each embeds its share
    num_nodes: int = 1
    eval: dict[str, Any] = field(default_factory=dict)  # tasks by name
    features: str | None = None  # folder of embeddings that commands leave for each other
    track: Any = None  # where the numbers are registered, beside <out>
    allow_foreign_targets: bool = False  # whether a config may call what is not ours


@dataclass
class ExportConfig:
    """`python -m pipeline.export`: a finished run -> what other software loads."""

    run: str = MISSING
    out: str = MISSING
    checkpoint: str | None = None
    weights: str = "trained"  # trained | ema: the run's moving average
    format: Any = MISSING
    license: str | None = None  # of the weights, for the card: apache-2.0, cc-by-4.0, other ...
    push_to: str | None = None  # USER/NAME on the Hugging Face hub
    private: bool = True  # of a new repository there
    allow_foreign_targets: bool = False  # whether a config may call what is not ours


@dataclass
class ReportConfig:
    """`python -m pipeline.report`: a run -> report.html in its folder."""

    run: str = MISSING


@dataclass
class DashboardConfig:
    """`python -m pipeline.dashboard`: our panels -> a W&B project."""

    entity: str = MISSING  # user or team
    project: str = "pairwright"
    runs: list[str] = field(default_factory=list)  # names of the report's runs; none: all


@dataclass
class CurateConfig:
    """`python -m curation.run [explain|plan]`: ingest -> annotate -> select -> pack."""

    action: str = "run"  # run | explain (why one pair was kept or dropped) | plan (hours it takes)
    uid: str | None = None  # explain: the pair, by uid or by the pool's own key
    nodes: int = 1  # plan: machines
    sample: int = 256  # plan: pairs that each annotator is timed on
    pool: str = MISSING  # directory of the raw pool
    out: str | None = MISSING  # directory of the curated shards
    cache: str | None = None  # annotations; null: <pool>.annotations beside the pool
    only: str | None = None  # ingest | annotate | select | pack: stop after this stage
    seed: int = 0
    ingest: Any = MISSING
    annotate: dict[str, Any] = field(default_factory=dict)  # annotators by name
    select: dict[str, Any] = field(default_factory=dict)  # selectors by name, applied in `order`
    order: list[str] = field(default_factory=list)
    pack: Any = MISSING
    engine: Any = MISSING
    track: Any = None  # where the finished dataset is registered
    allow_foreign_targets: bool = False  # whether a config may call what is not ours


ROOTS = {
    "train": TrainConfig,
    "train_captioner": TrainCaptionerConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "dashboard": DashboardConfig,
    "curate": CurateConfig,
}
COLLECTIONS = {
    "loss",
    "callbacks",
    "tracking",
    "eval",
    "annotate",
    "select",
}  # components keyed by name
PLAIN = {"loss_weights", "recipe_info", "order", "frozen", "runs"}  # values, not components
ELSEWHERE = {"phases", "every_phase"}  # checked as the configs that they make

for _name, _schema in ROOTS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a component node (nested components first); `extra` are run-time arguments.

    Raises ValueError, with the component's path, for what its constructor says is wrong.
    """
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        # Hydra's last line; the error has no field for it
        _, known, path = str(error).rpartition("full_key: ")
        raise ValueError(f"{path}: {error.__cause__}" if known else error.__cause__) from error


def _schema_of(target: Any) -> tuple[Any, bool]:
    """A dataclass with one field per constructor parameter, and whether it takes **kwargs."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    fields, open_ended = [], False
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            open_ended |= parameter.kind is parameter.VAR_KEYWORD
            continue
        hint = hints.get(name, Any)
        args = set(typing.get_args(hint))
        scalar = hint in SCALARS or (args - {type(None)} <= SCALARS and type(None) in args)
        fields.append((name, hint if scalar else Any, field(default=MISSING)))
    return make_dataclass("Signature", fields), open_ended


def _component_problems(node: DictConfig, path: str) -> list[str]:
    name = node["_target_"]
    try:
        target = pkgutil.resolve_name(name)
        schema, open_ended = _schema_of(target)
    except (ImportError, AttributeError, ValueError, TypeError, NameError) as error:
        return [f"{path}: cannot import {name} ({type(error).__name__}: {error})"]
    known, found = schema.__dataclass_fields__, []
    given = [str(key) for key in node if not str(key).startswith("_")]
    for key in given:
        if key not in known and not open_ended:
            found.append(f"{path}.{key}: {name} takes no '{key}' (it takes: {', '.join(known)})")
        elif key in known and not OmegaConf.is_missing(node, key):
            try:
                value = node[key]
                if not OmegaConf.is_config(value):
                    OmegaConf.structured(schema)[key] = value
            except InterpolationToMissingValueError:
                continue  # named where it is missing
            except OmegaConfBaseException as error:
                found.append(f"{path}.{key}: {str(error).splitlines()[0]}")
    if node.get("_partial_"):
        return found
    for key, parameter in inspect.signature(target).parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and key not in given:
            found.append(f"{path}: {name} needs '{key}'")
    return found


def _lone_values(cfg: DictConfig) -> list[str]:
    """Numbers and words of a root config where only a component, or null, makes sense."""
    fields = getattr(OmegaConf.get_type(cfg), "__dataclass_fields__", {})
    places = [(cfg, key, key) for key in cfg if key in fields and fields[key].type is Any]
    for group in COLLECTIONS & fields.keys():
        places += [(cfg[group], key, f"{group}.{key}") for key in cfg[group]]
    return [
        f"{path}: {node[key]!r} is no component: give {{_target_: ...}} as the files of "
        f"conf/{path.partition('.')[0]} do, or null (a phase cannot choose one by its name)"
        for node, key, path in places
        if not (OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key))
        if node[key] is not None and not OmegaConf.is_config(node[key])
    ]


def problems(node: Any, path: str = "", *, inside: bool = False) -> list[str]:
    """Every reason why this config could not be built, as `path: reason` lines. Builds nothing."""
    found: list[str] = []
    if isinstance(node, ListConfig):
        for index, item in enumerate(node):
            found += problems(item, f"{path}[{index}]", inside=inside)
        return found
    if not isinstance(node, DictConfig):
        return found
    if path in PLAIN | ELSEWHERE:
        return found
    keys = [str(key) for key in node]
    if not path:
        found += _lone_values(node)
    if "_target_" in keys:
        found += _component_problems(node, path)
        inside = True
    elif path and path not in COLLECTIONS and not inside and keys:
        found.append(
            f"{path}: nobody reads this: a node is a component (_target_) or a known group"
        )
    for key in keys:
        here = f"{path}.{key}".lstrip(".")
        if OmegaConf.is_missing(node, key):
            found.append(f"{here}: {MISSING_WORD} {here}=...")
            continue
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            continue
        except OmegaConfBaseException as error:  # an interpolation that points nowhere
            found.append(f"{here}: {str(error).splitlines()[0]}")
            continue
        found += problems(value, here, inside=inside)
    return found


def batch_problems(cfg: DictConfig, world_size: int) -> list[str]:
    """Arithmetic of a training run on `world_size` processes."""
    if any(OmegaConf.is_missing(cfg, key) for key in ("global_batch_size", "samples_seen")):
        return []  # `problems` names them
    found, batch = [], cfg.global_batch_size
    micro = OmegaConf.select(cfg, "micro_batch_size")
    if batch < 1:
        return [f"global_batch_size: {batch} must be at least 1"]
    if batch % world_size:
        down = batch - batch % world_size
        found.append(
            f"global_batch_size: {batch} is not a multiple of {world_size} processes: "
            f"set global_batch_size to {down or world_size} or {down + world_size}"
        )
    if cfg.samples_seen < batch:
        found.append(f"samples_seen: {cfg.samples_seen} is less than one batch of {batch} pairs")
    if OmegaConf.select(cfg, "optimizer_state", default="keep") not in ("keep", "reset"):
        found.append(f"optimizer_state: {cfg.optimizer_state!r} is neither 'keep' nor 'reset'")
    warmup = OmegaConf.select(cfg, "schedule.warmup_samples", default=0)
    if isinstance(warmup, int) and warmup >= cfg.samples_seen:
        found.append(
            f"schedule.warmup_samples: {warmup} is not below samples_seen={cfg.samples_seen}: "
            "shorten the warm-up or lengthen the run"
        )
    local = batch // world_size
    if micro is not None and not 1 <= micro <= max(local, 1):
        found.append(
            f"micro_batch_size: {micro} must be between 1 and the local batch of {local} pairs "
            f"(global_batch_size={batch}, {world_size} processes)"
        )
    return found


def typed() -> list[str]:
    """The words of the command line, where a command of Hydra's runs."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def run_problems(cfg: DictConfig, world_size: int, words: Sequence[str] = ()) -> list[str]:
    """The problems of a command's config, for a training run with its arithmetic, for one with
    phases those of each phase; what is wrong in every phase is named once.

    words: of the command line, which phases may overrule.
    """
    foreign = [] if cfg.get("allow_foreign_targets") else foreign_targets(cfg)
    if foreign:
        return foreign  # before `problems`, which imports what a target names
    training = OmegaConf.get_type(cfg) in (TrainConfig, TrainCaptionerConfig)
    if not cfg.get("phases"):
        keys = [word.lstrip("+").partition("=")[0] for word in words]
        unread = [
            f"{key}: has no effect, the run has no phases: set {key.partition('.')[2]}"
            for key in keys
            if key.startswith("every_phase.")
        ]
        return unread + problems(cfg) + (batch_problems(cfg, world_size) if training else [])
    found = phase_problems(cfg, words)
    if found:
        return found
    each = {}
    for name in cfg.phases:
        config = phase_config(cfg, name)
        each[name] = problems(config) + batch_problems(config, world_size)
    everywhere = [line for line in each[next(iter(each))] if all(line in e for e in each.values())]
    found = list(everywhere)
    for name, lines in each.items():
        found += [f"phases.{name}.{line}" for line in lines if line not in everywhere]
    return found


def check(cfg: DictConfig, *, world_size: int = 1, complete: bool = True) -> None:
    """Raise ValueError with every problem of a composed config, one a line.

    complete: false lets values be missing (`???`), for presets that leave some to the user.
    """
    found = run_problems(cfg, world_size, typed())
    if not complete:
        found = [line for line in found if MISSING_WORD not in line]
    if found:
        raise ValueError(listed(found))


def listed(found: list[str]) -> str:
    """Problems as one text, each once."""
    lines = "\n".join(f"  {line}" for line in dict.fromkeys(found))
    return f"{len(found)} problem(s) in the config:\n{lines}"


@contextlib.contextmanager
def user_errors(command: str) -> Iterator[None]:
    """A user's mistake (ValueError) ends a command with one message and exit code 2.

    PAIRWRIGHT_TRACEBACK=1 shows where it was raised instead. Also sets up the command's log lines.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except ValueError as error:
        if os.environ.get("PAIRWRIGHT_TRACEBACK"):
            raise
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
