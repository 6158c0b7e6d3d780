"""What a training run would do wrongly, or not at all, without a word: read off the config, before
anything is built.
"""

from omegaconf import DictConfig, OmegaConf

from pipeline.config import listed
from pipeline.phases import phase_config

# Lightning's options that are given by `run.make_trainer`, or mean something else in a run of ours.
INSTEAD = {
    "max_steps": "set samples_seen",
    "max_epochs": "set samples_seen",
    "default_root_dir": "set runs_dir and name",
    "callbacks": "set callbacks, +callbacks.NAME={_target_: ...}",
    "logger": "set tracking, +tracking.NAME={_target_: ...}",
    "log_every_n_steps": "set log_every_steps",
    "enable_checkpointing": "set checkpoint_every_steps",
    "fast_dev_run": "give debug=tiny and a name of its own",
    "plugins": "leave it out, checkpoints are written by ours",
    "enable_progress_bar": "leave it out, the bar is ours",
    "enable_model_summary": "leave it out, the tables at the start are ours",
    "use_distributed_sampler": "leave it out, every rank reads its own pairs",
}
ROUNDED = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")
PRODUCTS = ("highest", "high", "medium")  # torch's words


def option_problems(cfg: DictConfig) -> list[str]:
    """Reasons against a composed training config, as `path: reason` lines; a phase's own by its
    name. Another command's config has none.
    """
    trainer = OmegaConf.select(cfg, "trainer") or {}
    found = [
        f"trainer.{key}: would be ignored, or change the run behind its config: {INSTEAD[key]}"
        for key in trainer
        if key in INSTEAD
    ]
    if trainer.get("precision") in ROUNDED:
        found.append(
            f"trainer.precision: {trainer.precision} keeps weights in half precision, which loses "
            "small steps (the logit scale never moves): set bf16-mixed"
        )
    phases = {f"phases.{name}.": phase_config(cfg, name) for name in cfg.get("phases") or {}}
    for prefix, config in (phases or {"": cfg}).items():
        found += [prefix + line for line in _step_problems(config)]
    return found


def _step_problems(cfg: DictConfig) -> list[str]:
    clip, every = (OmegaConf.select(cfg, k) for k in ("gradient_clip_norm", "log_every_steps"))
    found = []
    if clip is not None and not clip > 0:
        found.append(f"gradient_clip_norm: {clip} must be above 0, or null for none")
    products = cfg.get("float32_matmul_precision", PRODUCTS[0])
    if products not in PRODUCTS:
        found.append(f"float32_matmul_precision: {products!r} is none of {', '.join(PRODUCTS)}")
    if every is not None and every < 1:
        found.append(f"log_every_steps: {every} must be at least 1")
    return found


def refuse_wrong_options(cfg: DictConfig) -> None:
    """Raise ValueError with every problem, one a line."""
    found = option_problems(cfg)
    if found:
        raise ValueError(listed(found))
