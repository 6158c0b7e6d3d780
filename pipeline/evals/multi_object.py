"""Two objects in one picture and one sentence: which of them the embedding remembers (the question
of ComCO, arXiv:2502.19842, asked here of pictures composed from a labelled set).

Letters: P pairs of classes, D embedding width.
"""

import io
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.images import decode
from pipeline.evals.bootstrap import mean
from pipeline.evals.labelled_images import prompt
from pipeline.evals.labelled_parquet import labelled
from pipeline.evals.ranking import TIE
from pipeline.evals.task import Embedder, in_batches, similarities

SINGLE, BOTH = "a photo of {c}", "a photo of {c} and {d}"


class Scene(NamedTuple):
    """Two classes, a third that is not shown, an image of each of the two, and on which side of the
    picture the larger object stands.
    """

    first: str
    second: str
    other: str
    images: tuple[bytes, bytes]
    large_left: bool


class MultiObject:
    """Shares in [0, 1] over pairs of classes, each shown twice: either object is the large one.

    data, split: a labelled set, as `ZeroShot`'s; the first image of each class is used.
    pairs: how many; which ones is a function of the seed and the names.
    large, small: sides of the two objects, as shares of the picture's side.

    text_first: the text of both is nearer to the one named first than to the one named second, 0.5
        for no bias (a tie counts half); image_large: the picture of both is nearer to the picture
        of the large one alone.
    match_large_first: the picture scores its caption, larger object first, above both captions in
        which one object is another class (a tie counts against); match_small_first: the same with
        the smaller object first; match_drop: their difference. Chance of either is a third.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        pairs: int = 500,
        side: int = 224,
        large: float = 0.6,
        small: float = 0.3,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if not 0 < small < large or small + large > 1 or pairs < 1 or side < 16:
            raise ValueError(
                f"large={large}, small={small}, pairs={pairs}, side={side}: need 0 < small < "
                "large, their sum at most 1, a pair, 16 pixels"
            )
        self.images = labelled(Path(data), split)
        self.pairs, self.side, self.large, self.small = pairs, side, large, small
        self.seed, self.batch_size = seed, batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """All numbers; see the class."""
        found: dict[str, list[Tensor]] = {}
        for scenes in in_batches(self.scenes(), self.batch_size):
            for turned in (False, True):  # either object is the large one, and is named first
                here = [_turned(scene) if turned else scene for scene in scenes]
                for name, values in self._asked(trained, here).items():
                    found.setdefault(name, []).append(values)
        joined = {name: torch.cat(values) for name, values in found.items()}
        drop = joined["match_large_first"] - joined["match_small_first"]
        return {name: mean(values) for name, values in {**joined, "match_drop": drop}.items()}

    def _asked(self, trained: Embedder, scenes: list[Scene]) -> dict[str, Tensor]:
        """What each scene answers, its first object the large one: (P,) in [0, 1] a name."""
        size = self.batch_size
        texts = {
            "first": [prompt(SINGLE, s.first) for s in scenes],
            "second": [prompt(SINGLE, s.second) for s in scenes],
            "both": [both(s.first, s.second) for s in scenes],
            "reverse": [both(s.second, s.first) for s in scenes],
            "wrong_first": [both(s.other, s.second) for s in scenes],
            "wrong_second": [both(s.first, s.other) for s in scenes],
            "reverse_wrong_first": [both(s.second, s.other) for s in scenes],
            "reverse_wrong_second": [both(s.other, s.first) for s in scenes],
        }
        text = {name: trained.text_embed(t, batch_size=size) for name, t in texts.items()}
        pictures = [self._picture(scene) for scene in scenes]
        picture = trained.image_embed(pictures, batch_size=size)
        large, small = (
            trained.image_embed(
                [composed((s.images[n],), self.side, (share,)) for s in scenes], batch_size=size
            )
            for n, share in ((0, self.large), (1, self.small))
        )

        def match(caption: str) -> Tensor:
            wrong = [
                similarities(trained, picture, text[f"{caption}wrong_{n}"])
                for n in ("first", "second")
            ]
            right = similarities(trained, picture, text[caption.removesuffix("_") or "both"])
            return (right > torch.stack(wrong).amax(0) + TIE).double()

        return {
            "text_first": _won(trained, text["both"], text["first"], text["second"]),
            "image_large": _won(trained, picture, large, small),
            "match_large_first": match(""),
            "match_small_first": match("reverse_"),
        }

    def _picture(self, scene: Scene) -> bytes:
        """Both objects, the first one large."""
        step = 1 if scene.large_left else -1
        return composed(scene.images[::step], self.side, (self.large, self.small)[::step])

    def scenes(self) -> list[Scene]:
        """Each class beside another, and a third, in an order drawn from the seed."""
        names, images = self.images.class_names(), {}
        for image, label in self.images.samples():
            images.setdefault(label, image)
        known = sorted(images, key=lambda label: _key(self.seed, names[label]))
        if len(known) < 3:
            raise ValueError(f"{self.images.directory}: images of {len(known)} classes, need 3")
        found = []
        for number in range(min(self.pairs, len(known) * (len(known) - 2))):
            # the next round pairs each class with one farther away
            at, step = number % len(known), 1 + number // len(known)
            first, second = known[at], known[(at + step) % len(known)]
            other = known[(at + step + 1) % len(known)]
            if other == first:
                other = known[(at + step + 2) % len(known)]
            trio = [names[label] for label in (first, second, other)]
            # left in one half of the pairs, or a bias of place would look like one of size
            found.append(Scene(*trio, (images[first], images[second]), number % 2 == 0))
        return found


def both(first: str, second: str) -> str:
    """The caption of two objects."""
    return BOTH.replace("{c}", first).replace("{d}", second)


def composed(images: tuple[bytes, ...], side: int, shares: tuple[float, ...]) -> bytes:
    """PNG of white, `side` pixels: the images from left to right, each a square of its share."""
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    left = round(side * (1 - sum(shares)) / 2)
    for image, share in zip(images, shares, strict=True):
        edge = max(1, round(side * share))
        picture = decode(image).resize((edge, edge), Image.Resampling.BICUBIC)
        canvas.paste(picture, (left, (side - edge) // 2))
        left += edge
    sink = io.BytesIO()
    canvas.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def _turned(scene: Scene) -> Scene:
    return scene._replace(first=scene.second, second=scene.first, images=scene.images[::-1])


def _won(trained: Embedder, asked: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(P,): 1 where the first is nearer, 0.5 for a tie."""
    difference = similarities(trained, asked, first) - similarities(trained, asked, second)
    return torch.where(difference.abs() <= TIE, 0.5, (difference > 0).double())


def _key(seed: int, name: str) -> bytes:
    return blake2b(name.encode(), key=str(seed).encode()).digest()
