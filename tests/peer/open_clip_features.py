"""Run by the peer interpreter: what open_clip makes of an exported directory.

    python open_clip_features.py DIRECTORY INPUTS OUTPUTS [DIRECTORY INPUTS OUTPUTS ...]

INPUTS and OUTPUTS are files of torch.save: pixels, images (encoded), captions, token_ids in;
embeddings and what open_clip's tokenizer and transform give out.
"""

import io
import sys

import open_clip
import torch
from PIL import Image


def main(directory: str, inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    name = f"local-dir:{directory}"
    model, _, prepare = open_clip.create_model_and_transforms(name)
    from_pretrained, _ = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    images = [prepare(Image.open(io.BytesIO(data))) for data in given["images"]]
    token_ids = tokenizer(given["captions"])
    with torch.no_grad():
        found = {
            "tokenizer": type(tokenizer).__name__,
            "token_ids": token_ids,
            "simple_token_ids": open_clip.get_tokenizer("ViT-B-32")(given["captions"]),
            "prepared": torch.stack(images),
            "image_embed": model.encode_image(given["pixels"], normalize=True),
            "text_embed": model.encode_text(given["token_ids"], normalize=True),
            "own_text_embed": model.encode_text(token_ids, normalize=True),
            "from_pretrained_text_embed": from_pretrained.eval().encode_text(
                given["token_ids"], normalize=True
            ),
            "logit_scale": model.logit_scale.exp(),
            "logit_bias": model.logit_bias,
        }
    torch.save(found, outputs)


if __name__ == "__main__":
    for start in range(1, len(sys.argv), 3):  # one process for several: its imports take seconds
        main(*sys.argv[start : start + 3])
