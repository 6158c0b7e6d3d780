"""A copy of a pool with words of their own captions written on some of the images.

    python benchmarks/plant_text.py --pool examples/emoji/pool --out runs/planted --share 0.3

For the parrot filter's comparison in earns_its_place.py: pictures of emoji carry hardly any text,
web images do, and 30 % of LAION-2B's caption words stand in the image ("Parrot Captions",
arXiv:2312.14232). Which pairs get a word depends on each pair alone.
"""

import argparse
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs without an installation, from anywhere

from curation.step import uniform  # noqa: E402
from pipeline.evals.text_spotting import written  # noqa: E402
from pipeline.shards import content_uid, write_table  # noqa: E402

WORD = re.compile(r"\b[A-Za-z]{3,8}\b")  # longer ones are too small to read on the strip
SIDE, BAND = 128, 0.3  # as the probe writes in conf/eval/text_spotting.yaml


def planted(image: bytes, caption: str, share: float) -> bytes:
    """The image with the longest short word of its caption (the first of them), or as it was."""
    words = WORD.findall(caption)
    if not words or uniform(0, "plant", [content_uid(image, caption)])[0] >= share:
        return image
    return written(image, max(words, key=len), side=SIDE, band=BAND)


def main() -> None:
    """Write each Parquet file of the pool anew, and say how many images got a word."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, required=True, help="Parquet, Hugging Face layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.3, help="of the pairs with such a word")
    options = parser.parse_args()
    files = sorted(options.pool.glob("*.parquet"))
    if not files or not 0 <= options.share <= 1:
        sys.exit(f"plant_text: {len(files)} *.parquet in {options.pool}, share {options.share}")
    changed = 0
    for file in files:
        table = pq.read_table(file)
        rows = []
        for image, caption in zip(
            table["image"].to_pylist(), table["caption"].to_pylist(), strict=True
        ):
            data = planted(image["bytes"], caption, options.share)
            changed += data != image["bytes"]
            rows.append({**image, "bytes": data})
        column = pa.array(rows, table.schema.field("image").type)
        place = table.schema.get_field_index("image")
        write_table(options.out / file.name, table.set_column(place, "image", column))
    print(f"{changed:,} images got a word")


if __name__ == "__main__":
    main()
