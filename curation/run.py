"""COMMAND: a raw pool -> curated shards.

    clip-curate pool=DIR out=DIR [dataset=PRESET]         # or python -m curation.run
    clip-curate explain uid=UID pool=DIR out=DIR ...      # why a pair was kept or dropped
    clip-curate plan [nodes=N] pool=DIR out=DIR ...       # how many hours it would take

ingest -> annotate -> select -> pack; each stage finds what is already there and does only the
rest, so the same line continues a killed run, and a changed threshold costs seconds.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from curation import plan
from curation.card import data_card
from curation.explain import explain
from curation.pool import Facts, Pool, annotate_unit, default_cache, ingest_file
from curation.report import write_report
from curation.selection import Selection, select
from pipeline.command import entry
from pipeline.config import build, check

STAGES = ("ingest", "annotate", "select", "pack")
ACTIONS = ("run", "explain", "plan")


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
    """Everything the command does; returns the selection, or None when it stopped before it."""
    check(cfg)
    _check_words(cfg)
    nodes = selected(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    pool = Pool(
        cfg.pool, Path(cfg.cache or default_cache(cfg.pool)), build(cfg.ingest), plain["ingest"]
    )
    engine, logs = build(cfg.engine), pool.cache / "logs"
    if cfg.action == "plan":
        Console(stderr=True).print(predicted(cfg, plain, pool, engine))
        return None
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
    if cfg.action == "explain":
        Console(stderr=True).print(explain(pool, facts, selectors, selection, cfg.uid))
        return selection
    show(selection)
    if cfg.only == "select":
        return selection
    out, pack = Path(cfg.out), build(cfg.pack)
    manifest = pack.run(pool, selection, out, engine, seed=cfg.seed)
    if manifest is not None:
        card = data_card(manifest, pool, facts, selection)
        write_report(out, manifest, card, pool, selection, facts)
        pack.finish(out, manifest)
        if cfg.track is not None:
            build(cfg.track).log(out, manifest, card)
    Console(stderr=True).print(f"curated shards: {out}   report: {out / 'report.html'}")
    return selection


def _check_words(cfg: DictConfig) -> None:
    if cfg.only is not None and cfg.only not in STAGES:
        raise ValueError(f"only={cfg.only}: stages are {', '.join(STAGES)}")
    if cfg.action not in ACTIONS:
        raise ValueError(f"action={cfg.action}: actions are {', '.join(ACTIONS)}")
    if (cfg.action == "explain") != (cfg.uid is not None):
        raise ValueError("explain needs uid=UID (a pair's uid or key), and uid= needs explain")
    if cfg.nodes < 1 or cfg.sample < 1:
        raise ValueError(f"nodes={cfg.nodes}, sample={cfg.sample}: need at least 1 of each")


def predicted(cfg: DictConfig, plain: dict[str, Any], pool: Pool, engine: Any) -> Table:
    """What `plan` says: each stage's throughput on a sample and the hours that follow."""
    costs = [plan.ingest_cost(pool)]
    for unit in pool.ingest_units()[:1]:  # annotators read ingested rows
        if not unit.done:
            ingest_file(*unit.arguments)
    for name, node in cfg.annotate.items():
        config = plain["annotate"][name]
        fact = Facts(pool, build(node), config)
        costs.append(plan.annotator_cost(pool, name, fact, config, cfg.sample))
    pairs, counted = plan.pool_size(pool)
    return plan.table(costs, pairs, counted=counted, nodes=cfg.nodes, workers=engine.workers)


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


@entry("clip-curate", config="curate", choices="dataset")
def main(cfg: DictConfig) -> None:
    """Compose, check, run."""
    run(cfg)


def command() -> None:
    """`clip-curate explain uid=...` is `clip-curate action=explain uid=...`."""
    if len(sys.argv) > 1 and sys.argv[1] in ACTIONS:
        sys.argv[1] = f"action={sys.argv[1]}"
    main()


if __name__ == "__main__":
    command()
