"""Do our captioner's own captions find their images? Retrieval R@1 on held-out images, against a
unigram captioner.

    python benchmarks/captioner.py shards=DIR run=PROXY_RUN work=DIR output=FILE.md

A tenth of the images (by a hash of their bytes) is held out; the captioner is trained on the rest
by `python -m pipeline.train_captioner`. Each held-out image is captioned; each caption then looks
for its image among all held-out images, by the proxy's embeddings. The unigram captioner draws as
many words, each by its frequency among the training captions. run=own trains the proxy too, on the
training part alone (recipe=emoji), so that nothing has seen a held-out image. Words that begin with
"captioner." go to pipeline.train_captioner: captioner.train_image=true.
"""

import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from curation.step import uniform
from pipeline.evals.ranking import ranks, recall
from pipeline.evals.trained import TrainedClip
from pipeline.evals.trained_captioner import TrainedCaptioner
from pipeline.shards import Record, records, write_manifest, write_shard

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 0.1
GUIDANCE = (0.0, 1.0, 1.5, 2.0, 3.0)
DATE = "2026-11-23"
MACHINE = "2 cores of a shared x86-64 server"


def split(shards: str) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records, one an image): no image is in both."""
    everything = list(records(shards))
    draws = uniform(0, "benchmarks/captioner", [record.info["sha256"] for record in everything])
    train = [r for r, draw in zip(everything, draws, strict=True) if draw >= HELD_OUT]
    held = {
        r.info["sha256"]: r for r, draw in zip(everything, draws, strict=True) if draw < HELD_OUT
    }
    return train, list(held.values())


def write_dataset(folder: Path, train: Sequence[Record]) -> None:
    """The training part as a dataset of ours."""
    if (folder / "manifest.json").exists():
        return
    shard = write_shard(folder, "shard-000000", train)
    total = {"num_samples": len(train), "num_bytes": shard["num_bytes"]}
    write_manifest(folder, {**total, "shards": [shard], "steps": [], "seed": 0})


def command(module: str, *words: str) -> float:
    """Run a command of ours; returns its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", module, *words], check=True, cwd=ROOT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def own_proxy(work: Path, samples: int) -> str:
    """A proxy that has seen the training part alone."""
    data = str(work / "train")
    if not (work / "tokenizer").exists():
        words = ("--shards", data, "--vocab-size", "3000", "--out", str(work / "tokenizer"))
        command("pipeline.data.train_tokenizer", *words)
    command(
        "pipeline.train",
        *("recipe=emoji", "name=proxy", f"runs_dir={work}", f"data.shards={data}"),
        *(f"tokenizer.path={work / 'tokenizer'}", f"samples_seen={samples}", "data.workers=0"),
        *(f"schedule.warmup_samples={samples // 10}", "tracking=file"),
    )
    return str(work / "proxy")


def unigrams(train: Iterable[Record], lengths: Sequence[int], seed: int) -> list[str]:
    """A caption of each length: words drawn by their frequency in the training captions."""
    counts = Counter(word for record in train for word in record.caption.lower().split())
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(list(counts), weights=list(counts.values()), k=max(1, length)))
        for length in lengths
    ]


def recalls(proxy: TrainedClip, captions: Sequence[str], images: torch.Tensor) -> dict[int, float]:
    """R@1 and R@5 of each caption for its own image among all, in percent."""
    scores = proxy.text_embed(captions) @ images.T
    found = recall(ranks(scores, torch.eye(len(captions), dtype=torch.bool)), at=(1, 5))
    return {k: 100 * value for k, value in found.items()}


def captions_of(
    captioner: TrainedCaptioner, images: Sequence[bytes], guidance: float, batch: int = 128
) -> list[str]:
    """Greedy captions."""
    texts = []
    for start in range(0, len(images), batch):
        pixels = captioner.pixels(images[start : start + batch])
        texts += captioner.caption(pixels, guidance=guidance)[0]
    return texts


def main() -> None:
    """Split, train, caption, retrieve, write."""
    given = {
        "samples": "51200",
        "proxy_samples": "204800",
        **dict(word.split("=", 1) for word in sys.argv[1:]),
    }
    extra = [f"{k.removeprefix('captioner.')}={v}" for k, v in given.items() if "captioner." in k]
    missing = {"shards", "run", "work", "output"} - given.keys()
    if missing:
        sys.exit(f"give {', '.join(f'{key}=...' for key in sorted(missing))}")
    torch.set_num_threads(1)
    work, samples = Path(given["work"]).resolve(), int(given["samples"])
    train, held = split(given["shards"])
    write_dataset(work / "train", train)
    run = given["run"] if given["run"] != "own" else own_proxy(work, int(given["proxy_samples"]))
    trained, seconds = (work / "captioner").exists(), work / "cpu_seconds"
    spent = command(
        "pipeline.train_captioner",
        *(f"data.shards={work / 'train'}", f"run={Path(run).resolve()}", "name=captioner"),
        *(f"runs_dir={work}", f"samples_seen={samples}", "data.workers=0"),
        *(f"schedule.warmup_samples={samples // 10}", "trainer.accelerator=cpu"),
        *extra,
    )
    if not trained:  # a report can be made again without training
        seconds.write_text(f"{spent:.0f}")
    training = float(seconds.read_text())
    proxy, captioner = TrainedClip.load(run), TrainedCaptioner.load(work / "captioner")
    images = [record.image for record in held]
    embeds = proxy.image_embed(images)
    rows, examples = [], {}
    for guidance in GUIDANCE:
        start = time.process_time()
        texts = captions_of(captioner, images, guidance)
        rate = len(images) / (time.process_time() - start)
        lengths = [len(text.split()) for text in texts]
        blind = [recalls(proxy, unigrams(train, lengths, seed), embeds) for seed in range(5)]
        unigram = {k: sum(found[k] for found in blind) / len(blind) for k in (1, 5)}
        rows.append((guidance, recalls(proxy, texts, embeds), unigram, len(set(texts)), rate))
        examples[guidance] = texts
    human = recalls(proxy, [record.caption for record in held], embeds)
    report(given, rows, human, (len(train), len(held)), samples, training, examples, held)


def report(given, rows, human, sizes, samples, training, examples, held) -> None:
    """Write the table and print it."""
    shown = " ".join(f"{key}={'DIR' if key != 'run' else 'RUN'}" for key in ("shards", "run"))
    if given["run"] == "own":
        shown = f"shards=DIR run=own proxy_samples={given['proxy_samples']}"
    shown += "".join(f" {key}={value}" for key, value in given.items() if "captioner." in key)
    judge = (
        "the proxy, too, was trained on the training part alone"
        if given["run"] == "own"
        else "the proxy was trained on a pool that holds the held-out images"
    )
    lines = [
        "# The captioner's own captions, R@1 on held-out images",
        "",
        f"{DATE}, {MACHINE}, Python {platform.python_version()}, torch {torch.__version__}.",
        f"`python benchmarks/captioner.py {shown} work=DIR output=FILE samples={samples}`",
        "",
        f"{sizes[0]:,} training pairs, {sizes[1]:,} held-out images; {samples:,} pairs seen by the "
        f"captioner, {training:.0f} CPU seconds; {judge}. Greedy.",
        "Text to image, per cent; each caption's own image alone is right. Unigram: as many words, "
        "drawn by frequency (mean of 5 draws).",
        "",
        "| guidance | R@1 | R@5 | unigram R@1 | unigram R@5 | distinct captions | images / CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for guidance, ours, blind, different, rate in rows:
        lines.append(
            f"| {guidance:g} | {ours[1]:.1f} | {ours[5]:.1f} | {blind[1]:.1f} | {blind[5]:.1f} "
            f"| {different} | {rate:.0f} |"
        )
    lines += [
        f"| the pool's own captions | {human[1]:.1f} | {human[5]:.1f} | | | "
        f"{len({record.caption for record in held})} | |",
        "",
        f"Chance: {100 / sizes[1]:.2f}. Guidance 0 does not look at the image.",
        "",
        "| pool's caption | guidance 1 | guidance 3 |",
        "|---|---|---|",
    ]
    for place in range(0, len(held), max(1, len(held) // 12)):
        texts = (held[place].caption, examples[1.0][place], examples[3.0][place])
        lines.append("| " + " | ".join(text.replace("|", "/") for text in texts) + " |")
    text = "\n".join(lines) + "\n"
    Path(given["output"]).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
