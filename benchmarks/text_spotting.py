"""What does the text_spotting annotator cost beside its engine alone?

    python benchmarks/text_spotting.py --output FILE.md

Both read the same images at the same scaling in one process, image by image in turns, on one thread
each; CPU time. The engine alone is given decoded, scaled pixels and does what it does for anybody:
find and read lines. The annotator starts from the files' bytes: it decodes, scales, cuts lines into
words with boxes, measures areas and makes rows.
"""

import argparse
import importlib.metadata
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

# runs without an installation, from anywhere
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from curation.annotate.text_spotting import TextSpotting  # noqa: E402
from pipeline.data.images import decode  # noqa: E402

WORDS = ["exit", "open", "sale", "taxi", "police", "no", "smoking", "museum", "of", "modern", "art"]


def pool_images(count: int) -> list[bytes]:
    """Files of the sample pool, evenly spread."""
    files = sorted((ROOT / "examples/emoji/pool").glob("*.parquet"))
    images = [row["bytes"] for file in files for row in pq.read_table(file)["image"].to_pylist()]
    return images[:: max(1, len(images) // count)][:count]


def signs(count: int, side: int, seed: int) -> list[bytes]:
    """JPEGs of a coloured board with one to three lines of one or two words."""
    draw, files = np.random.default_rng(seed), []
    for _ in range(count):
        image = Image.new("RGB", (side, side), tuple(draw.integers(0, 120, 3).tolist()))
        pen = ImageDraw.Draw(image)
        for line in range(int(draw.integers(1, 4))):
            text = " ".join(draw.choice(WORDS, int(draw.integers(1, 3))))
            font = ImageFont.load_default(side // 10)
            pen.text((side // 12, side // 8 + line * side // 4), text, font=font, fill="white")
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def measure(
    images: Sequence[bytes], runs: dict[str, Callable[[bytes, np.ndarray], Any]], rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of each way over all images, a number a round; ways take turns image by image."""
    scaled = [np.ascontiguousarray(TextSpotting().scaled(decode(i))[:, :, ::-1]) for i in images]
    for run in runs.values():
        run(images[0], scaled[0])  # loads the models
    seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in runs}
    for number in range(rounds):
        for image, pixels in zip(images, scaled, strict=True):
            for name, run in runs.items():
                start = time.process_time()
                run(image, pixels)
                seconds[name][number] += time.process_time() - start
    return seconds


def ways() -> dict[str, Callable[[bytes, np.ndarray], Any]]:
    """name -> what is timed, of (file bytes, scaled BGR pixels)."""
    from rapidocr_onnxruntime import RapidOCR

    alone = RapidOCR(
        det_limit_side_len=32,
        det_limit_type="min",
        intra_op_num_threads=1,
        inter_op_num_threads=1,
    )
    annotator = TextSpotting()
    return {
        "engine alone, decoded pixels": lambda _, pixels: alone(pixels, use_cls=False),
        "annotator, decoded pixels": lambda _, pixels: annotator.spot(
            Image.fromarray(pixels[:, :, ::-1])
        ),
        "annotator, file bytes": lambda image, _: annotator.annotate([{"uid": "", "image": image}]),
    }


def report(sets: dict[str, list[bytes]], rounds: int) -> str:
    """The rows of the table, in Markdown."""
    lines = []
    for title, images in sets.items():
        seconds = measure(images, ways(), rounds)
        base = next(iter(seconds.values()))
        for name, mine in seconds.items():
            # of the same round, so that a busy moment of the machine hits all
            share = statistics.median(b / m for b, m in zip(base, mine, strict=True))
            each = statistics.median(mine) / len(images)
            lines.append(
                f"| {title} | {name} | {1e3 * each:.2f} | {1 / each:.1f} | {100 * share:.1f} % |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400, help="of the sample pool")
    parser.add_argument("--signs", type=int, default=40, help="boards with words, of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--date", default="undated")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sets = {
        f"{options.images} of the sample pool, 64 px": pool_images(options.images),
        f"{options.signs} boards with words, 256 px": signs(options.signs, 256, 0),
        f"{options.signs // 4} boards with words, 640 px": signs(options.signs // 4, 640, 1),
    }
    table = report(sets, options.rounds)
    print(table)
    if options.output:
        packages = ("rapidocr-onnxruntime", "onnxruntime", "numpy", "pillow")
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
        options.output.write_text(
            PAGE.format(
                date=options.date,
                versions=f"Python {platform.python_version()}, {versions}",
                command=" ".join(["python", *sys.argv]),
                rounds=options.rounds,
                table=table,
            ),
            encoding="utf-8",
        )


PAGE = """# Text spotting beside its engine alone

{date}. 2 cores of a shared x86-64 server. {versions}.
`{command}`

One thread, CPU time, ways in turns image by image in one process. Both see an image at the same
size (64 pixels a side at least, 960 at most). The last column is the median over {rounds} rounds of
the ratio within a round. The engine alone (rapidocr, detector and recogniser) starts from decoded,
scaled pixels and reads lines. The annotator adds words with boxes, covered areas and rows; "file
bytes" also decodes and scales.

| images | way | ms an image, CPU | images a CPU second | speed of the engine alone |
|---|---|---|---|---|
{table}
"""

if __name__ == "__main__":
    main()
