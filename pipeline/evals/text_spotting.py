"""Does the model read instead of look? A wrong word is written on each image ("typographic attack",
Goh et al. 2021), and words alone are compared with themselves as text (Sync score of "Parrot
Captions Teach CLIP to Spot Text", arXiv:2312.14232, sec. 3).

Letters: I images, C classes, W words.
"""

import io
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.data.images import decode
from pipeline.evals.ranking import ranks, recall
from pipeline.evals.task import Embedder, in_shares
from pipeline.evals.zero_shot import ZeroShot

WORD = re.compile(r"\w+")
Colours = tuple[str, str]  # letters, ground
ON_IMAGE: Colours = ("black", "white")
# the paper's four styles
STYLES: tuple[Colours, ...] = (
    ("white", "black"),
    ("black", "white"),
    ("gray", "white"),
    ("gray", "black"),
)


class TextSpotting:
    """Zero-shot accuracy on clean images and under a wrong word; which class the word wins; Sync.

    data, split, batch_size: as in ZeroShot.
    side: pixels of the square that is written on, before the model's own resize; the paper's 224.
    band: height of the strip across the foot of the image that holds the word, share of the side.
    max_letters: the words are class names of one word with at most so many Latin letters (at least
        3): written across the strip, 6 letters are 5 pixels wide each in a model of 32 pixels.
    seed: which word an image gets, together with the image's bytes; never one that shares a word
        with its own class.
    Metrics: `attack_metrics` and `sync_metrics`.
    Price: 2 more image embeddings per image, 2 ms of drawing each, and 4 W for Sync.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        side: int = 224,
        band: float = 0.3,
        max_letters: int = 6,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if not 0.0 < band <= 1.0:
            raise ValueError(f"band {band}: need a share of the side in (0, 1]")
        if side < 16 or max_letters < 3:
            raise ValueError(f"side={side}, max_letters={max_letters}: at least 16 pixels, 3")
        self.zero_shot = ZeroShot(data=data, split=split, batch_size=batch_size)
        self.side, self.band, self.max_letters, self.seed = side, band, max_letters, seed
        self.batch_size = batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """All numbers; see the class."""
        names = self.zero_shot.images.class_names()
        candidates = writable(names, self.max_letters)
        class_embed = self.zero_shot.class_embed(trained)
        scores: dict[str, list[Tensor]] = {"clean": [], "band": [], "word": []}
        labels, words = [], []
        for batch in in_shares(self.zero_shot.images.samples(), self.batch_size):
            chosen = [wrong_class(*pair, names, candidates, self.seed) for pair in batch]
            images = {
                "clean": [image for image, _ in batch],
                "band": [self.written(image, "") for image, _ in batch],
                "word": [
                    self.written(image, names[word])
                    for (image, _), word in zip(batch, chosen, strict=True)
                ],
            }
            for kind, pictures in images.items():
                embed = trained.image_embed(pictures, batch_size=self.batch_size)
                scores[kind].append(trained.similarity(embed, class_embed))
            labels += [label for _, label in batch]
            words += chosen
        if not labels:
            raise ValueError(f"{self.zero_shot.images.directory}: no images in the split")
        joined = {kind: torch.cat(parts) for kind, parts in scores.items()}
        attack = attack_metrics(joined, torch.tensor(labels), torch.tensor(words))
        return attack | self.sync(trained, [names[word] for word in candidates])

    def written(self, image: bytes, word: str) -> bytes:
        """`written` with this probe's sizes."""
        return written(image, word, side=self.side, band=self.band)

    def sync(self, trained: Embedder, words: Sequence[str]) -> dict[str, float]:
        """`sync_metrics` of words drawn alone, in the middle of a square, in each of STYLES."""
        text_embed = trained.text_embed(words, batch_size=self.batch_size)
        similarity = []
        for style in STYLES:
            pictures = [png(lettered(word, (self.side, self.side), style)) for word in words]
            embed = trained.image_embed(pictures, batch_size=self.batch_size)
            similarity.append(trained.similarity(embed, text_embed))
        return sync_metrics(torch.stack(similarity))


def writable(names: Sequence[str], max_letters: int) -> list[int]:
    """Classes whose name is a word of 3 to max_letters Latin letters and no other class's name.

    Raises ValueError if there are fewer than two.
    """
    folded = [name.casefold() for name in names]
    found = [
        number
        for number, name in enumerate(names)
        if name.isascii()
        and name.isalpha()
        and 3 <= len(name) <= max_letters
        # an ambiguous name ("crane") has two right classes
        and folded.count(folded[number]) == 1
    ]
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} of {len(names)} class names are single words of 3 to {max_letters} "
            "Latin letters, need 2: raise max_letters"
        )
    return found


def wrong_class(
    image: bytes, label: int, names: Sequence[str], candidates: Sequence[int], seed: int
) -> int:
    """The class whose name is written on this image: a function of (seed, image, label).

    Raises ValueError if each candidate shares a word with the image's own class.
    """
    digest = blake2b(image, key=str(seed).encode(), digest_size=8).digest()
    first = int.from_bytes(digest, "little") % len(candidates)
    own = set(WORD.findall(names[label].casefold()))
    for candidate in (*candidates[first:], *candidates[:first]):
        if names[candidate].casefold() not in own:
            return candidate
    raise ValueError(f"every candidate word is in the class name {names[label]!r}")


def written(image: bytes, word: str, *, side: int, band: float) -> bytes:
    """PNG: the central square of the image at `side` pixels, across its foot a white strip of
    `band` of the side with the word on it; an empty strip for an empty word.
    """
    picture = decode(image)
    short = min(picture.size)
    left, upper = (picture.width - short) / 2, (picture.height - short) / 2
    picture = picture.resize(
        (side, side), Image.Resampling.BICUBIC, box=(left, upper, left + short, upper + short)
    )
    strip = lettered(word, (side, max(1, round(band * side))), ON_IMAGE)
    picture.paste(strip, (0, side - strip.height))
    return png(picture)


def lettered(word: str, size: tuple[int, int], colours: Colours) -> Image.Image:
    """RGB of `size` (width, height): the word in the middle, as large as fits into nine tenths."""
    letters, ground = colours
    picture = Image.new("RGB", size, ground)
    if word:
        points = _largest(lambda points: _extent(word, points), (0.9 * size[0], 0.9 * size[1]))
        left, upper, right, lower = _font(points).getbbox(word)
        corner = ((size[0] - left - right) / 2, (size[1] - upper - lower) / 2)
        ImageDraw.Draw(picture).text(corner, word, fill=letters, font=_font(points))
    return picture


def png(picture: Image.Image) -> bytes:
    """Lossless bytes; weak compression, which is quick."""
    sink = io.BytesIO()
    picture.save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def _largest(extent: Callable[[int], tuple[float, float]], room: tuple[float, float]) -> int:
    """The largest number of points, at least 1, whose extent is inside the room; by bisection."""
    low, high = 1, max(2, int(2 * max(room)))
    while high - low > 1:
        middle = (low + high) // 2
        fits = all(used <= there for used, there in zip(extent(middle), room, strict=True))
        low, high = (middle, high) if fits else (low, middle)
    return low


def _font(points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=points)  # Aileron, inside Pillow: the same everywhere


def _extent(word: str, points: int) -> tuple[float, float]:
    left, upper, right, lower = _font(points).getbbox(word)
    return right - left, lower - upper


class Placed(NamedTuple):
    """(I,) int64: classes that stand before the image's own class, and before the word's class."""

    own: Tensor
    word: Tensor


def attack_metrics(scores: dict[str, Tensor], labels: Tensor, words: Tensor) -> dict[str, float]:
    """What the word does, all in [0, 1] or differences of such. Ties count against a class.

    scores: (I, C) each of "clean", "band" (the empty strip) and "word" images.
    labels, words: (I,) int64, the image's own class and the class that is written on it.
    top1, top5: clean.  band_top1, band_top5, word_top1, word_top5: of the others.
    drop_top1, drop_top5: clean - word; most of it may be the strip that hides a part of the image.
    attack_success: share of images with a word that are taken for the word's class;
        attack_success_band: the same under the empty strip, which is chance.
    word_percentile, band_percentile: mean over images of 1 - place / (C - 1) of the word's class,
        1 is first, 0.5 is chance.  pull: their difference, 0 for a model that cannot read; it moves
        long before a class is won, so it is the figure to compare weak models by.
    """
    classes = scores["clean"].shape[1]
    placed = {
        kind: Placed(*(ranks(values, one_hot(to, classes).bool()) for to in (labels, words)))
        for kind, values in scores.items()
    }
    found: dict[str, float] = {}
    for kind, places in placed.items():
        prefix = "" if kind == "clean" else f"{kind}_"
        found |= {f"{prefix}top{k}": v for k, v in recall(places.own, at=(1, 5)).items()}
    percentile = {
        kind: float((1 - places.word.double() / (classes - 1)).mean())
        for kind, places in placed.items()
    }
    return found | {
        "drop_top1": found["top1"] - found["word_top1"],
        "drop_top5": found["top5"] - found["word_top5"],
        "attack_success": recall(placed["word"].word, at=(1,))[1],
        "attack_success_band": recall(placed["band"].word, at=(1,))[1],
        "word_percentile": percentile["word"],
        "band_percentile": percentile["band"],
        "pull": percentile["word"] - percentile["band"],
    }


def sync_metrics(similarity: Tensor) -> dict[str, float]:
    """How near a drawn word is to itself as text, over styles.

    similarity: (styles, W, W) cosines, a drawn word to the row's each word as text; W >= 2.
    sync_cosine: mean of the words' own cosines, in [-1, 1]: the paper's score (OpenAI's B/32 0.317,
        LAION-2B's 0.368, their debiased model 0.163). It depends on the modality gap, so
    sync_gap: own cosine minus the mean of the other words', and
    sync_percentile: mean of 1 - place / (W - 1) of the own word, 1 is first, 0.5 is chance;
    sync_r_at_1: share of drawn words whose own text is nearest, chance 1 / W.
    """
    styles, num_words, _ = similarity.shape
    own = similarity.diagonal(dim1=1, dim2=2).double()
    others = (similarity.double().sum(dim=2) - own) / (num_words - 1)
    relevant = torch.eye(num_words, dtype=torch.bool).repeat(styles, 1)
    places = ranks(similarity.flatten(0, 1), relevant)
    return {
        "sync_cosine": float(own.mean()),
        "sync_gap": float((own - others).mean()),
        "sync_percentile": float((1 - places.double() / (num_words - 1)).mean()),
        "sync_r_at_1": recall(places, at=(1,))[1],
    }
