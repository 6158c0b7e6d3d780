"""Run by the peer interpreter: how many parameters open_clip's models have.

python open_clip_sizes.py NAME [NAME ...]         prints one number a line
"""

import logging
import sys

import open_clip
import torch


def main(names: list[str]) -> None:
    logging.disable()
    for name in names:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta")
        print(sum(parameter.numel() for parameter in model.parameters()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
