"""Does decode=fast cost accuracy? The sample pool as JPEGs, trained on with both, seed by seed.

    python benchmarks/decode_accuracy.py --work DIR --seeds 0 1 2 --output FILE.md

The pool's pictures (64 to 72 pixels a side, PNG and WebP) are laid on white and written as JPEGs
of quality 90 at --enlarge times their size; the model reads 32 pixels, so that a fast crop is
decoded at 4/8 (or less) wherever its shorter side has 48 pixels. Evaluation reads the held-out
drawings as they are, by PIL, for both. What is done in --work is found again.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.images import ImageTransform, decode
from pipeline.data.jpeg import eighths, read_header
from pipeline.shards import Record, records, write_manifest, write_shard

ROOT = Path(__file__).resolve().parents[1]
DATE = "2026-11-25"
MACHINE = "2 cores of a shared x86-64 server"
MODES = ("exact", "fast")
METRICS = ("zero_shot/top1", "zero_shot/top5", "retrieval/image_to_text_r_at_5")


def command(module: str, *words: str) -> None:
    """Run a command of ours on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-m", module, *words], check=True, cwd=ROOT, env=environment)


def as_jpeg(record: Record, enlarge: int) -> Record:
    image, sink = decode(record.image), io.BytesIO()
    image = image.resize((enlarge * image.width, enlarge * image.height))
    image.save(sink, "JPEG", quality=90)
    return Record(record.uid, sink.getvalue(), "jpg", record.caption, record.info)


def prepare(work: Path, enlarge: int) -> tuple[Path, Path]:
    """(JPEG shards, tokenizer)."""
    raw, jpegs, tokenizer = work / "raw", work / f"jpeg-{enlarge}", work / "tokenizer"
    if not (raw / "manifest.json").exists():
        command(
            "curation.run",
            *("dataset=raw", "pool=examples/emoji/pool", f"out={raw}", f"cache={work / 'cache'}"),
        )
    if not (jpegs / "manifest.json").exists():
        made = (as_jpeg(record, enlarge) for record in records(raw))
        entry = write_shard(jpegs, "shard-000000", made)
        total = {"num_samples": entry["num_samples"], "num_bytes": entry["num_bytes"]}
        write_manifest(jpegs, {**total, "shards": [entry], "steps": [], "seed": 0})
    if not tokenizer.exists():
        words = ("--shards", str(raw), "--vocab-size", "3000", "--out", str(tokenizer))
        command("pipeline.data.train_tokenizer", *words)
    return jpegs, tokenizer


def train(work: Path, jpegs: Path, tokenizer: Path, mode: str, seed: int, samples: int) -> dict:
    """The numbers of one run."""
    name = f"{jpegs.name}-{samples}-{mode}-seed{seed}"
    run = work / "runs" / name
    if not list((run / "eval").glob("*.json")):
        command(
            "pipeline.train",
            *("recipe=emoji", f"name={name}", f"runs_dir={work / 'runs'}", "tracking=file"),
            *(f"data.shards={jpegs}", f"tokenizer.path={tokenizer}", "data.workers=0"),
            *(f"seed={seed}", f"transform.decode={mode}", f"samples_seen={samples}"),
            *(f"schedule.warmup_samples={samples // 10}", "trainer.devices=1"),
        )
        command("pipeline.evaluate", f"run={run}", "eval=emoji")
    found = {}
    for path in sorted((run / "eval").glob("*.json")):
        metrics = json.loads(path.read_text())["metrics"]
        found |= {key.removeprefix("eval/"): value for key, value in metrics.items()}
    return found


def scales(jpegs: Path) -> Counter:
    """Eighths that fast crops of the pool are decoded at."""
    transform, found = ImageTransform(image_size=32, crop_scale=(0.6, 1.0)), Counter()
    for number, record in enumerate(records(jpegs)):
        header = read_header(record.image)
        box = transform.crop_box(*header, np.random.default_rng(number))
        found[eighths(box, 32)] += 1
    return found


def report(options: argparse.Namespace, figures: dict, counted: Counter) -> str:
    total = counted.total()
    shares = ", ".join(f"{100 * counted[n] / total:.0f} % at {n}/8" for n in sorted(counted))
    words = f"--work DIR --samples {options.samples} --enlarge {options.enlarge}"
    lines = [
        "# Fast decoding and accuracy",
        "",
        f"{DATE}, {MACHINE}. Python {platform.python_version()}, torch {version('torch')}, "
        f"simplejpeg {version('simplejpeg')}.",
        f"`python benchmarks/decode_accuracy.py {words} "
        f"--seeds {' '.join(map(str, options.seeds))}`",
        "",
        f"The {total:,} raw pairs of the sample pool as JPEGs, recipe=emoji, {options.samples:,}",
        f"pairs seen. Fast crops: {shares}. Per cent on 1,190 classes, one held-out drawing each.",
        "",
        "| metric | seed | exact | fast | fast - exact |",
        "|---|---|---|---|---|",
    ]
    for metric in METRICS:
        differences = []
        for seed in options.seeds:
            exact, fast = (100 * figures[seed, mode][metric] for mode in MODES)
            differences.append(fast - exact)
            lines.append(f"| {metric} | {seed} | {exact:.2f} | {fast:.2f} | {fast - exact:+.2f} |")
        if len(differences) > 1:
            mean, spread = statistics.mean(differences), statistics.stdev(differences)
            error = spread / len(differences) ** 0.5
            lines.append(f"| {metric} | mean | | | {mean:+.2f} +- {error:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder; what is done stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=76_800, help="pairs seen by each run")
    parser.add_argument("--enlarge", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = options.work.resolve()
    jpegs, tokenizer = prepare(work, options.enlarge)
    figures = {}
    for seed in options.seeds:
        for mode in MODES:
            start = time.monotonic()
            figures[seed, mode] = train(work, jpegs, tokenizer, mode, seed, options.samples)
            print(f"seed {seed}, {mode}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    text = report(options, figures, scales(jpegs))
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
