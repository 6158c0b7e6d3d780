"""A small BPE vocabulary of a dataset's own captions.

python -m pipeline.data.train_tokenizer --shards DIR --vocab-size 4096 --out DIR
"""

import argparse
import sys
from pathlib import Path

from pipeline.data.tokenizer import train_bpe
from pipeline.shards import records


def main() -> None:
    """Read a dataset's captions, learn, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="a dataset of ours")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids, SOT and EOT included")
    parser.add_argument("--out", type=Path, required=True, help="directory of the vocabulary")
    options = parser.parse_args()
    try:
        captions = (record.caption for record in records(options.shards))
        size = train_bpe(captions, vocab_size=options.vocab_size, directory=options.out)
    except ValueError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.out}: {size} ids", file=sys.stderr)


if __name__ == "__main__":
    main()
