"""In the peer environment: CLIP_benchmark's own numbers of an export of ours.

python clip_benchmark_numbers.py EXPORT INPUTS.pt OUT.json
"""

import io
import json
import sys

import open_clip
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

export, inputs, out = sys.argv[1:]
given = torch.load(inputs, weights_only=True)
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{export}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{export}")
model.eval()
pixels = [transform(Image.open(io.BytesIO(data))) for data in given["images"]]


class Pairs(torch.utils.data.Dataset):
    """(pixels, target), as CLIP_benchmark's datasets are."""

    classes = given["class_names"]

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(pixels)

    def __getitem__(self, index):
        return pixels[index], self.targets[index]


def several(batch):
    """A list of captions an image."""
    return torch.stack([image for image, _ in batch]), [texts for _, texts in batch]


# clip-benchmark 1.6.2 calls float() on arrays of shape (1,), which numpy 2.4 refuses.
to_numpy = torch.Tensor.numpy
torch.Tensor.numpy = lambda tensor: to_numpy(tensor.squeeze() if tensor.shape == (1,) else tensor)

loader = torch.utils.data.DataLoader
found = zeroshot_classification.evaluate(
    model,
    loader(Pairs(given["labels"]), batch_size=16),
    tokenizer,
    given["class_names"],
    given["templates"],
    "cpu",
    amp=False,
)
found |= zeroshot_retrieval.evaluate(
    model,
    loader(Pairs(given["captions"]), batch_size=16, collate_fn=several),
    tokenizer,
    "cpu",
    amp=False,
    recall_k_list=[1, 5, 10],
)
with open(out, "w") as file:
    json.dump({key: value for key, value in found.items() if isinstance(value, float)}, file)
