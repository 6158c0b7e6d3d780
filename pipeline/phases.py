"""A run as a sequence of phases: each is the run's own config with some values changed.

    phases:
      pretrain: {samples_seen: 1_000_000, model: {image: {image_size: 112}}}
      tune: {samples_seen: 100_000, optimizer: {lr: 1.0e-5}, image_tokens: null}

A phase may change every key but those of FIXED. A component with another `_target_` replaces the
run's; with the same one, or none, it changes the named values. Interpolations are resolved within
the phase: the transform follows the phase's image size. Of model and tokenizer only sizes may
change (RESIZABLE), what does not fit any more is resized once, where the phase begins.

`every_phase` holds changes that are made last, in each phase: a whole recipe is made small with it,
whatever its phases say. Its samples_seen is the sum over the phases, which see equal shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

FIXED = (  # what belongs to the run as a whole
    "name",
    "runs_dir",
    "seed",
    "phases",
    "every_phase",
    "init",
    "trainer",
    "tracking",
    "keep_checkpoints",
    "recipe_info",
)
LEARNT = ("model", "tokenizer")  # what weights belong to; of it a phase changes no more than:
RESIZABLE = (
    "tokenizer.context_length",
    "model.image.image_size",
    "model.text.context_length",
    "model.image.activation_checkpointing",
    "model.text.activation_checkpointing",
)


@dataclass(frozen=True)
class Phase:
    """name: "" for a run without phases.  config: the run's, as it stands in this phase.

    first_step, first_sample: optimizer steps and pairs before it.  steps: its own.
    """

    name: str
    config: DictConfig
    first_step: int
    first_sample: int
    steps: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps

    @property
    def samples(self) -> int:
        """Pairs that the phase sees: whole batches."""
        return self.steps * self.config.global_batch_size

    def samples_at(self, step: int) -> int:
        """Pairs of the run before optimizer step `step` (counted from 0) of this phase."""
        return self.first_sample + (step - self.first_step) * self.config.global_batch_size


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """A nested config as {dotted key: value}."""
    if isinstance(node, Mapping):
        pairs = ((f"{path}.{key}".lstrip("."), value) for key, value in node.items())
        return {name: leaf for p, value in pairs for name, leaf in flat(value, p).items()}
    return {path: node}


def _change(node: DictConfig, change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        before = None if OmegaConf.is_missing(node, key) else node.get(key)
        same = (
            isinstance(value, Mapping)
            and isinstance(before, DictConfig)
            and value.get("_target_") in (None, before.get("_target_"))
        )
        if same:
            _change(before, value)
        else:
            node[key] = value


def _changes(cfg: DictConfig, key: str, node: DictConfig | None) -> dict[str, Any]:
    """The changes below `key`. Raises ValueError for a key of the whole run, or of nothing."""
    if node is not None and not OmegaConf.is_dict(node):
        raise ValueError(
            f"{key}: {node!r} changes nothing: give what it changes, {key}.samples_seen=..."
        )
    change = OmegaConf.to_container(node, resolve=False) if node else {}
    known = list(cfg)  # `in` would hide missing values
    for name in change:
        if name in FIXED:
            raise ValueError(
                f"{key}.{name}: belongs to the run as a whole; a phase can change anything "
                f"but {', '.join(FIXED)}"
            )
        if name not in known:
            raise ValueError(f"{key}.{name}: a run has no such key")
    return change


def _equal_share(config: DictConfig, names: list[str], name: str) -> int:
    """Pairs of one phase, whole batches, where samples_seen of `config` is the sum over them."""
    batch, index = config.global_batch_size, names.index(name)
    begin, end = (
        config.samples_seen * n // len(names) // batch * batch for n in (index, index + 1)
    )
    return end - begin


def phase_config(cfg: DictConfig, name: str) -> DictConfig:
    """The run's config as it stands in the phase `name`. Raises ValueError for a key that belongs
    to the whole run, KeyError or another of OmegaConf's for one that is no key.
    """
    change = _changes(cfg, f"phases.{name}", cfg.phases[name])
    last = _changes(cfg, "every_phase", cfg.get("every_phase"))
    config = cfg.copy()
    with open_dict(config):  # a wrong key within a component is named by `config.problems`
        config.samples_seen = MISSING  # the run's is the sum
        config.phases, config.every_phase = {}, {}
        _change(config, change)
        _change(config, last)
        if "samples_seen" in last and not OmegaConf.is_missing(config, "global_batch_size"):
            config.samples_seen = _equal_share(config, list(cfg.phases), name)
    return config


def phases(cfg: DictConfig) -> list[Phase]:
    """The phases of a run in order; one without a name for a run that has none."""
    named = {name: phase_config(cfg, name) for name in cfg.get("phases") or {}} or {"": cfg}
    plan: list[Phase] = []
    step = sample = 0
    for name, config in named.items():
        steps = config.samples_seen // config.global_batch_size
        plan.append(Phase(name, config, step, sample, steps))
        step, sample = plan[-1].end_step, sample + plan[-1].samples
    return plan


def phase_of(config: DictConfig, name: str) -> DictConfig:
    """The config of a phase, from the config.yaml of a run directory, where phases are whole.

    name: as in a checkpoint; "" is the run's own config.
    """
    return config.phases[name] if name else config


def _overruled(cfg: DictConfig, words: Sequence[str]) -> list[str]:
    """Words of the command line (key=value) without effect: each phase has its own value."""
    nodes = {f"phases.{name}": node for name, node in cfg.phases.items()}
    nodes["every_phase"] = cfg.get("every_phase")
    changes = {path: flat(_changes(cfg, path, node)) for path, node in nodes.items()}
    found = []
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        over = {
            path: f"{path}.{leaf}=..."
            for path, change in changes.items()
            for leaf in change
            if f"{key}.".startswith(f"{leaf}.")
        }
        everywhere = "every_phase" in over or len(over) == len(cfg.phases)
        if everywhere and value != "???":
            instead = over.get("every_phase") or ", ".join(over.values())
            found.append(f"{key}: {value} has no effect, each phase has its own: set {instead}")
    return found


def phase_problems(cfg: DictConfig, words: Sequence[str] = ()) -> list[str]:
    """What a phase may not change, as `path: reason` lines; and which words of the command line
    have no effect in any.
    """
    found = []
    for name in cfg.phases:
        try:
            config = phase_config(cfg, name)
        except ValueError as error:
            found.append(str(error))
            continue
        ours, theirs = (
            flat(OmegaConf.to_container(OmegaConf.masked_copy(c, list(LEARNT)), resolve=False))
            for c in (config, cfg)
        )
        found += [
            f"phases.{name}.{key}: a phase cannot change it, the weights would not fit; it can "
            f"change {', '.join(RESIZABLE)}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and key not in RESIZABLE
        ]
    return found or _overruled(cfg, words)
