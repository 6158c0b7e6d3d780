"""Images per CPU second: ours beside open_clip's transform and loader, and beside MosaicML
streaming and Megatron-Energon with that transform.

    make peer && .venv-peer/bin/python -m pip install --no-deps -r requirements/loader_peers.txt
    .venv-peer/bin/python benchmarks/loader.py --photographs DIR --work DIR --output FILE.md

Everything runs in one process on one thread, ways taking turns; CPU time counts, the least of the
rounds. The JPEGs are 500x375, quality 85: photographs of DIR fitted to that size (any files PIL
reads; twelve of Debian's mate-backgrounds and seven of scikit-image and scikit-learn in the
committed results), and pictures made here with the statistics of photographs. A crop has 0.9 to
1.0 of the area, open_clip's default. PSNR is against PIL's bicubic on the same crop of the same
JPEG, before any mirror.
"""

import argparse
import importlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

# runs without an installation, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data import jpeg
from pipeline.data.foreign import build_index
from pipeline.data.images import ImageTransform
from pipeline.data.stream import ShardStream
from pipeline.data.tokenizer import BpeTokenizer
from pipeline.shards import Dataset, Record, write_manifest, write_shard

DATE = "2026-11-25"
MACHINE = "2 cores of a shared x86-64 server"
WIDTH, HEIGHT, QUALITY = 500, 375, 85
PAIRS, SHARDS, BATCH = 768, 4, 64


def pictures(count: int) -> list[Image.Image]:
    """Pictures whose amplitude falls with frequency as photographs' does, with edges in them."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        noise = rng.standard_normal((3, HEIGHT, WIDTH))
        spectrum = np.fft.rfft2(noise) / (frequency + 0.003) ** 1.5
        noise = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
        pixels = 128 + 40 * (noise[:1] + 0.3 * noise) / noise.std()
        for _ in range(8):
            x, y, side = rng.integers(0, WIDTH), rng.integers(0, HEIGHT), rng.integers(10, 90)
            pixels[:, y : y + side, x : x + side] += rng.uniform(-60, 60, (3, 1, 1))
        found.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return found


def photographs(folder: str) -> list[Image.Image]:
    """Every picture under a folder that is at least 500x300, fitted to 500x375."""
    found = []
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        try:
            image = Image.open(path).convert("RGB")
        except OSError:
            continue
        if image.width >= WIDTH and image.height >= 300:
            found.append(ImageOps.fit(image, (WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    return found


def encoded(images: Sequence[Image.Image]) -> list[bytes]:
    found = []
    for image in images:
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=QUALITY)
        found.append(sink.getvalue())
    return found


def least(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each way; ways take turns."""
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def decibels(data: Sequence[bytes], size: int, *, fast: bool) -> tuple[float, float]:
    """(mean, least) PSNR of our crops."""
    transform, found = ImageTransform(image_size=size), []
    for number, image in enumerate(data):
        header = jpeg.read_header(image)
        box = transform.crop_box(*header, np.random.default_rng(number))
        ours, taken = jpeg.cropped(image, header, box, size, fast=fast)
        pil = Image.open(io.BytesIO(image)).convert("RGB")
        wanted = np.asarray(pil.resize((size, size), Image.Resampling.BICUBIC, box=taken))
        error = (ours.permute(1, 2, 0).numpy().astype(float) - wanted) ** 2
        found.append(10 * math.log10(255**2 / error.mean()))
    return float(np.mean(found)), min(found)


def decoding(data: Sequence[bytes], size: int, rounds: int) -> list[str]:
    """Rows of the first table: bytes -> what goes to the device."""
    import open_clip

    theirs = open_clip.image_transform(size, is_train=True)
    ways = {"open_clip: PIL, torchvision": lambda: [theirs(_pil(image)) for image in data]}
    for mode in ("pil", "exact", "fast"):
        ours = ImageTransform(image_size=size, decode=mode)
        ways[f"ours, decode={mode}"] = lambda ours=ours: [
            ours.train(image, np.random.default_rng(n)) for n, image in enumerate(data)
        ]
        ways[f"ours, decode={mode}, normalised on the CPU"] = lambda ours=ours: ours.normalise(
            torch.stack([ours.train(im, np.random.default_rng(n)) for n, im in enumerate(data)])
        )
    seconds = least(ways, rounds)
    base, rows = seconds["open_clip: PIL, torchvision"], []
    for name, taken in seconds.items():
        quality = ""
        if name in ("ours, decode=exact", "ours, decode=fast"):
            mean, lowest = decibels(data, size, fast="fast" in name)
            quality = f"{mean:.1f} ({lowest:.1f})"
        rate = len(data) / taken
        rows.append(f"| {size} | {name} | {rate:.0f} | {base / taken:.2f}x | {quality} |")
    return rows


def _pil(image: bytes) -> Image.Image:
    # as webdataset's decode("pilrgb")
    opened = Image.open(io.BytesIO(image))
    opened.load()
    return opened.convert("RGB")


def write_pool(data: Sequence[bytes], work: Path) -> None:
    """PAIRS pairs as our shards; Energon gets the tars in a folder of its own."""
    shutil.rmtree(work, ignore_errors=True)
    made = []
    for number in range(PAIRS):
        uid = f"{number:032x}"
        caption = f"a photo of thing number {number} in the morning light"
        made.append(Record(uid, data[number % len(data)], "jpg", caption, {"uid": uid}))
    per = PAIRS // SHARDS
    entries = [
        write_shard(work / "ours", f"shard-{n:06d}", made[n * per : (n + 1) * per])
        for n in range(SHARDS)
    ]
    write_manifest(work / "ours", {"num_samples": PAIRS, "shards": entries, "steps": []})
    shutil.copytree(work / "ours", work / "energon", ignore=shutil.ignore_patterns("*.p*", "*.js*"))


def passes(batches: Iterator[Any]) -> None:
    for _, _ in zip(range(PAIRS // BATCH), batches, strict=False):
        pass


def our_stream(work: Path, mode: str) -> Callable[[], None]:
    def run() -> None:
        stream = ShardStream(
            shards=str(work / "ours"),
            transform=ImageTransform(image_size=224, decode=mode),
            tokenizer=BpeTokenizer(context_length=77),
            global_batch_size=BATCH,
        )
        passes(iter(stream))

    return run


def open_clip_stream(work: Path) -> Callable[[], None]:
    import open_clip
    from open_clip_train.data import get_wds_dataset

    args = Namespace(
        train_data=str(work / "ours" / f"shard-{{000000..{SHARDS - 1:06d}}}.tar"),
        train_num_samples=PAIRS,
        train_data_upsampling_factors=None,
        seed=0,
        workers=0,
        world_size=1,
        batch_size=BATCH,
    )
    prepare = open_clip.image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return lambda: passes(
        iter(get_wds_dataset(args, prepare, is_train=True, tokenizer=tokenizer).dataloader)
    )


def mosaic_stream(work: Path) -> Callable[[], None]:
    import open_clip
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(work / "mosaic"), columns={"jpg": "bytes", "txt": "str"}) as writer:
        dataset = Dataset(work / "ours")
        for number in range(PAIRS):
            shard, row = dataset.locate(number)
            writer.write({"jpg": shard.image(row), "txt": shard.captions[row]})
    prepare = open_clip.image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    class Pairs(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
            found = super().__getitem__(at)
            return prepare(_pil(found["jpg"])), tokenizer(found["txt"])[0]

    def run() -> None:
        pairs = Pairs(local=str(work / "mosaic"), shuffle=True, batch_size=BATCH)
        passes(iter(torch.utils.data.DataLoader(pairs, batch_size=BATCH)))

    return run


def energon_stream(work: Path) -> Callable[[], None]:
    import open_clip
    from megatron import energon

    subprocess.run(
        [
            *(sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--non-interactive"),
            *("--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--num-workers", "1"),
            *("--field-map", json.dumps({"image": "jpg", "caption": "txt"}), "--no-progress"),
            str(work / "energon"),
        ],
        check=True,
        capture_output=True,
    )
    prepare = open_clip.image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    class Encoder(energon.DefaultTaskEncoder):
        # Energon gives tensors; PIL's pixels are asked for, so that the transform is the same
        decoder = energon.SampleDecoder(image_decode="pilrgb")

        @energon.stateless
        def encode_sample(self, sample: Any) -> dict[str, torch.Tensor]:
            return {"image": prepare(sample.image), "text": tokenizer(sample.caption)[0]}

        def batch(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def run() -> None:
        pairs = energon.get_train_dataset(
            work / "energon",
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=BATCH,
            shuffle_buffer_size=100,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
        )
        passes(iter(energon.get_loader(pairs)))

    return run


def loading(work: Path, rounds: int) -> tuple[list[str], list[str]]:
    """(rows of the second table, why a peer is not in it): shards -> batches at 224 pixels."""
    ways, absent = {}, []
    for name, module, make in (
        ("open_clip's webdataset pipeline", "webdataset", open_clip_stream),
        ("MosaicML streaming, open_clip's transform", "streaming", mosaic_stream),
        ("Megatron-Energon, open_clip's transform", "megatron.energon", energon_stream),
    ):
        try:
            importlib.import_module(module)
            ways[name] = make(work)
            ways[name]()
        except Exception as error:  # whatever a peer's installation raises is the reason printed
            ways.pop(name, None)
            absent.append(f"{name}: not run ({type(error).__name__}: {str(error)[:200]})")
    for mode in ("pil", "exact", "fast"):
        ways[f"ours, decode={mode}"] = our_stream(work, mode)
    seconds = least(ways, rounds)
    base = seconds.get("open_clip's webdataset pipeline", math.nan)
    return [
        f"| {name} | {PAIRS / taken:.0f} | {base / taken:.2f}x |" for name, taken in seconds.items()
    ], absent


def reading(work: Path, rounds: int) -> list[str]:
    """Rows of the third table: bytes and captions alone."""
    import webdataset

    urls = [str(path) for path in sorted((work / "ours").glob("*.tar"))]
    dataset = Dataset(work / "ours", columns=["uid", "caption", "offset", "size"])
    places = np.random.default_rng(0).permutation(PAIRS).tolist()

    def ours() -> None:
        for _ in range(20):
            for number in places:
                shard, row = dataset.locate(number)
                assert shard.image(row) and shard.captions[row]

    def theirs() -> None:
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            assert sample["jpg"] and sample["txt"]

    data = [Path(url).read_bytes() for url in urls]

    def index() -> None:
        for _ in range(20):
            for url, tar in zip(urls, data, strict=True):
                build_index(tar, url)

    seconds = least({"ours": ours, "webdataset": theirs, "index": index}, rounds)
    rates = {"ours": 20 * PAIRS, "webdataset": PAIRS, "index": 20 * PAIRS}
    rates = {name: pairs / seconds[name] for name, pairs in rates.items()}
    return [
        f"| webdataset, in order | {rates['webdataset']:,.0f} |",
        f"| ours, in random order | {rates['ours']:,.0f} |",
        f"| ours, indexing a foreign tar, once | {rates['index']:,.0f} |",
    ]


def report(options: argparse.Namespace) -> str:
    sets = {"made here": encoded(pictures(16))}
    if options.photographs:
        sets = {"photographs": encoded(photographs(options.photographs)), **sets}
    lines = [
        "# Loading images: per CPU second of one thread",
        "",
        f"{DATE}, {MACHINE}, load {os.getloadavg()[0]:.1f} at the start. "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in ("torch", "pillow", "simplejpeg", "webdataset"))
        + f", open_clip {version('open-clip-torch')}, torchvision {version('torchvision')}.",
        "`python benchmarks/loader.py --photographs DIR --work DIR --output FILE`",
        "",
        f"JPEGs of {WIDTH}x{HEIGHT}, quality {QUALITY}, crops of 0.9 to 1.0 of the area.",
        "open_clip's way ends in normalised floats, ours in uint8, which the device normalises;",
        'the rows "normalised on the CPU" pay for that as well. PSNR in dB: mean (least).',
    ]
    for name, data in sets.items():
        size = np.mean([len(image) for image in data]) / 1000
        lines += [
            "",
            f"## Bytes to crops: {len(data)} {name}, {size:.0f} kB on average",
            "",
            "| side | way | images / CPU s | to open_clip | PSNR |",
            "|---|---|---|---|---|",
            *decoding(data, 224, options.rounds),
            *decoding(data, 112, options.rounds),
        ]
    work = Path(options.work)
    write_pool(next(iter(sets.values())), work)
    rows, absent = loading(work, options.rounds)
    lines += [
        "",
        f"## Shards to batches of {BATCH}, 224 pixels, captions tokenised, no worker processes",
        "",
        "| loader | pairs / CPU s | to open_clip |",
        "|---|---|---|",
        *rows,
        *([""] if absent else []),
        *absent,
        "",
        "## Image bytes and captions alone",
        "",
        "| reader | pairs / CPU s |",
        "|---|---|",
        *reading(work, options.rounds),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", help="folder of pictures; without it only made ones")
    parser.add_argument("--work", required=True, help="folder for the shards; made anew")
    parser.add_argument("--output", help="file of the results")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = report(options)
    print(text)
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
