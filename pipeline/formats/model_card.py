"""README.md of an exported model: what it is, what it saw, how good it is, how it is loaded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from pipeline.evals.trained import TrainedClip, read_checkpoint, run_config
from pipeline.shards import read_manifest

UNKNOWN = "not stated"
LIMITS = (
    "A contrastive image-text model repeats what its pairs say, mistakes and biases included. "
    "Numbers above are of the named sets alone. It has not been examined for any use that decides "
    "about people."
)


def model_card(
    trained: TrainedClip, run: str | Path, *, library: str, how_to_load: str, license: str | None
) -> str:
    """Markdown with the hub's YAML head, from what the run directory says; nothing is made up.

    library: the hub's `library_name`.  license: an SPDX id or the hub's own word; None: not stated.
    """
    run = Path(run)
    # only read here, and the model that `trained` has was allowed to be built
    config = run_config(run, trained.checkpoint, allow_foreign_targets=True)
    head = {
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "pairwright"],
        **({"license": license} if license else {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n",
        f"# {config.get('name', run.name)}\n",
        what_it_is(trained, config),
        f"## Loading it\n\n```python\n{how_to_load.strip()}\n```\n",
        training(trained, config, run),
        data(config),
        results(run),
        f"## Limits\n\n{LIMITS}\n",
        f"## Licence\n\n{license or UNKNOWN + ': ask whoever trained it before use'}\n",
    ]
    return "\n".join(part for part in parts if part)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def what_it_is(trained: TrainedClip, config: DictConfig) -> str:
    """Towers and sizes."""
    model = trained.model
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("image tower", f"{counts.get('image', 0):,} parameters, {model.image.image_size} pixels"),
        ("text tower", f"{counts.get('text', 0):,}, {model.text.context_length} positions"),
        ("embedding", f"{model.embed_dim} numbers, compared by cosine"),
        ("checkpoint", f"sha256 {digest(trained.checkpoint)}"),
    ]
    recipe = config.get("recipe_info") or {}
    rows += [(f"recipe: {name}", str(value)) for name, value in recipe.items()]
    return f"A CLIP model trained with pairwright.\n\n{table(('', ''), rows)}"


def digest(checkpoint: Path | None) -> str:
    """Of the file that the weights came from."""
    if checkpoint is None:
        return UNKNOWN
    with open(checkpoint, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def training(trained: TrainedClip, config: DictConfig, run: Path) -> str:
    """Length, batch, rate, and what the metrics say of the time it took."""
    step = "not stated"
    if trained.checkpoint is not None:
        step = f"{read_checkpoint(trained.checkpoint).get('global_step', 0):,}"
    rows = [
        ("steps", step),
        ("pairs of a step", f"{config.get('global_batch_size', 0):,}"),
        ("pairs to see", f"{config.get('samples_seen', 0) or 0:,}"),
        ("optimizer", f"{OmegaConf.select(config, 'optimizer._target_')}"),
        ("learning rate", f"{OmegaConf.select(config, 'optimizer.lr')}"),
        ("precision", f"{OmegaConf.select(config, 'trainer.precision')}"),
        ("seed", f"{config.get('seed')}"),
    ]
    rates = [row["perf/pairs_per_second"] for row in metrics(run) if "perf/pairs_per_second" in row]
    if rates:
        rows.append(("pairs per second, median", f"{sorted(rates)[len(rates) // 2]:,.0f}"))
    return f"## Training\n\n{table(('', ''), rows)}"


def metrics(run: Path) -> list[Mapping[str, Any]]:
    """Rows of metrics.jsonl; a torn one is left out."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def data(config: DictConfig) -> str:
    """The steps of the curation, from the shards' manifest."""
    shards = OmegaConf.select(config, "data.shards")
    if not isinstance(shards, str):
        return ""
    try:
        manifest = read_manifest(shards)
    except (ValueError, OSError):
        return "## Data\n\nThe shards' manifest was not at hand when this card was written.\n"
    rows = []
    for step in manifest.get("steps", []):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in step["dropped"].items())
        rows.append((step["name"], f"{step['read']:,}", f"{step['kept']:,}", reasons))
    words = f"{manifest['num_samples']:,} pairs; curated step by step:\n\n"
    return f"## Data\n\n{words}{table(('step', 'read', 'kept', 'dropped'), rows)}"


def results(run: Path) -> str:
    """What <run>/eval holds."""
    rows = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            found = json.loads(path.read_text())
            for key, value in found["metrics"].items():
                low, high = found.get("intervals", {}).get(key, (None, None))
                span = "" if low is None else f"{low:.4f} to {high:.4f}"
                of = ", ema weights" if found.get("weights") == "ema" else ""
                rows.append((key.removeprefix("eval/") + of, f"{value:.4f}", span))
        except (ValueError, KeyError, TypeError):
            rows.append((path.name, "cannot be read", ""))
    if not rows:
        return "## Results\n\nNone: `clip-eval run=...` before the export writes them here.\n"
    return f"## Results\n\n{table(('metric', 'value', '95 % interval'), rows)}"
