"""COMMAND: a raw pool -> curated shards. `python -m curation.run pool=DIR out=DIR
[dataset=PRESET]`.

ingest -> annotate -> select -> pack; each stage finds what is already there and does only the
rest, so the same line
continues a killed run, and a changed threshold costs seconds.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from curation.pool import Facts, Pool, annotate_unit, default_cache, ingest_file
from curation.report import write_report
from curation.selection import Selection, select
from pipeline.config import CONF, build, check, user_errors

STAGES = ("ingest", "annotate", "select", "pack")


def selected(cfg: DictConfig) -> dict[str, Any]:
    """The selectors of `order`, in that order. Raises ValueError for a name that select does not
    have.
    """
    unknown = [name for name in cfg.order if name not in cfg.select]
    if unknown:
        known = ", ".join(cfg.select) or "none"
        raise ValueError(f"order names {unknown}, but select has: {known}")
    return {name: cfg.select[name] for name in cfg.order}


def run(cfg: DictConfig) -> Selection | None:
    """Everything the command does; returns the selection, or None when `only` stopped before it."""
    check(cfg)
    if cfg.only is not None and cfg.only not in STAGES:
        raise ValueError(f"only={cfg.only}: stages are {', '.join(STAGES)}")
    nodes = selected(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    pool = Pool(
        cfg.pool, Path(cfg.cache or default_cache(cfg.pool)), build(cfg.ingest), plain["ingest"]
    )
    engine, logs = build(cfg.engine), pool.cache / "logs"
    units = pool.ingest_units()
    engine.run("ingest", ingest_file, units, logs / pool.folder.name, measure="B")
    pool.counts()  # stops here when too much of the pool is unusable
    if cfg.only == "ingest":
        return None
    facts = {
        name: Facts(pool, build(node), plain["annotate"][name])
        for name, node in cfg.annotate.items()
    }
    for name, fact in facts.items():
        engine.run(name, annotate_unit, fact.units(), logs / fact.folder.name)
    if cfg.only == "annotate":
        return None
    selectors = {name: build(node) for name, node in nodes.items()}
    configs = {name: plain["select"][name] for name in nodes}
    selection = select(pool, facts, selectors, configs, seed=cfg.seed)
    show(selection)
    if cfg.only == "select":
        return selection
    out, pack = Path(cfg.out), build(cfg.pack)
    manifest = pack.run(pool, selection, out, engine, seed=cfg.seed)
    if manifest is not None:
        write_report(out, manifest, pool, selection, facts)
        pack.finish(out, manifest)
    Console(stderr=True).print(f"curated shards: {out}   report: {out / 'report.html'}")
    return selection


def show(selection: Selection) -> None:
    """The table of what each step kept and why it dropped the rest."""
    table = Table(title="selection", title_justify="left")
    for column, justify in (("step", "left"), ("read", "right"), ("kept", "right"), ("%", "right")):
        table.add_column(column, justify=justify)
    table.add_column("dropped by reason")
    for step in selection.steps:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in step["dropped"].items())
        share = 100 * step["kept"] / max(step["read"], 1)
        table.add_row(
            step["name"], f"{step['read']:,}", f"{step['kept']:,}", f"{share:.1f}", reasons
        )
    Console(stderr=True).print(table)


@hydra.main(version_base="1.3", config_path=CONF, config_name="curate")
def main(cfg: DictConfig) -> None:
    """Compose, check, run."""
    with user_errors("clip-curate"):
        run(cfg)


if __name__ == "__main__":
    main()
