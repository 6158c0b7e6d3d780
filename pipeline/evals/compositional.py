"""Whether a caption is more than its words: images against captions that say something else with
nearly the same words (ARO, arXiv:2210.01936; SugarCrepe, arXiv:2306.14610; NegBench,
arXiv:2501.09425: the ideas, built here from any captions).

Letters: P pairs.
"""

import re
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.word_classes import ADJECTIVE, NOUN, class_of, lexicon
from pipeline.evals.bootstrap import mean
from pipeline.evals.ranking import TIE
from pipeline.evals.retrieval import Retrieval
from pipeline.evals.task import Embedder, in_shares, similarities

WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


class Compositional:
    """Share of images that score their caption above a changed one. Ties count against the model.

    data, split, max_pairs: as `Retrieval`'s; the primary caption of each pair is changed:
    swap_nouns: two different nouns change places; swap_attributes: two different adjectives;
    shuffle: all words, in an order drawn from (seed, caption); negation: "no" before the first
    noun and its adjectives. A caption that a kind cannot change is left out of it ({kind}_pairs).
    {kind}: the share; chance 0.5. {kind}_text_cosine: of both captions; 1 is a text tower that
    cannot tell them apart, whose share is 0.
    Not for other languages than English: what is no adjective or verb in the lexicon is a noun.
    """

    def __init__(
        self,
        *,
        data: str,
        split: str = "test",
        max_pairs: int | None = 5000,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        self.pairs = Retrieval(data=data, split=split, batch_size=batch_size)
        self.max_pairs, self.seed, self.batch_size = max_pairs, seed, batch_size

    def run(self, trained: Embedder) -> dict[str, float]:
        """All numbers of the kinds that change any caption."""
        own: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        texts: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for batch in in_shares(islice(self.pairs.pairs(), self.max_pairs), self.batch_size):
            image_embed = trained.image_embed([i for i, _ in batch], batch_size=self.batch_size)
            captions = [caption for _, caption in batch]
            text_embed = trained.text_embed(captions, batch_size=self.batch_size)
            for kind, change in KINDS.items():
                changed = [change(caption, self.seed) for caption in captions]
                rows = [n for n, text in enumerate(changed) if text not in (None, captions[n])]
                if not rows:
                    continue
                other = trained.text_embed([changed[n] for n in rows], batch_size=self.batch_size)
                image, text = image_embed[rows], text_embed[rows]
                right, wrong = (similarities(trained, image, x) for x in (text, other))
                own[kind].append(right > wrong + TIE)
                texts[kind].append(F.cosine_similarity(text, other))
        found: dict[str, float] = {}
        for kind in KINDS:
            if own[kind]:
                hits = torch.cat(own[kind])
                found[kind] = mean(hits)
                found[f"{kind}_pairs"] = float(len(hits))
                found[f"{kind}_text_cosine"] = float(torch.cat(texts[kind]).double().mean())
        if not found:
            raise ValueError(f"{self.pairs.data}: no caption that could be changed")
        return found


def words(caption: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, class) of each word."""
    known = lexicon()
    for found in WORD.finditer(caption):
        yield found.start(), found.end(), class_of(found[0].lower().encode(), True, known)


def swap_nouns(caption: str, seed: int) -> str | None:
    """The first noun and the next that differs change places."""
    return _swapped(caption, NOUN)


def swap_attributes(caption: str, seed: int) -> str | None:
    """The first adjective and the next that differs change places."""
    return _swapped(caption, ADJECTIVE)


def shuffle(caption: str, seed: int) -> str | None:
    """All words in an order drawn from (seed, caption)."""
    spans = [(start, end) for start, end, _ in words(caption)]
    if len(spans) < 2:
        return None
    keys = [
        blake2b(f"{n} {caption}".encode(errors="replace"), key=str(seed).encode()).digest()
        for n in range(len(spans))
    ]
    order = sorted(range(len(spans)), key=keys.__getitem__)
    return _with(caption, spans, [caption[slice(*spans[n])] for n in order])


def negation(caption: str, seed: int) -> str | None:
    """ "no" before the first noun and the adjectives that lead to it."""
    start = None
    for first, _, kind in words(caption):
        if kind == ADJECTIVE and start is None:
            start = first
        elif kind == NOUN:
            start = first if start is None else start
            return f"{caption[:start]}no {caption[start:]}"
        elif kind != ADJECTIVE:
            start = None
    return None


KINDS: dict[str, Callable[[str, int], str | None]] = {
    "swap_nouns": swap_nouns,
    "swap_attributes": swap_attributes,
    "shuffle": shuffle,
    "negation": negation,
}


def _swapped(caption: str, wanted: int) -> str | None:
    spans = [(start, end) for start, end, kind in words(caption) if kind == wanted]
    if not spans:
        return None
    first = caption[slice(*spans[0])]
    for span in spans[1:]:
        second = caption[slice(*span)]
        if second.lower() != first.lower():
            return _with(caption, [spans[0], span], [second, first])
    return None


def _with(caption: str, spans: list[tuple[int, int]], texts: list[str]) -> str:
    """The caption with these texts in the places of these spans."""
    parts, last = [], 0
    for (start, end), text in zip(spans, texts, strict=True):
        parts += [caption[last:start], text]
        last = end
    return "".join([*parts, caption[last:]])
