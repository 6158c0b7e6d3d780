"""Which of a record's captions is trained on: chosen anew each time a pair is seen.

A sampler is called with the record's captions, its primary text ({uid}.txt), a generator that is a
function of (seed, epoch, uid), and the epoch. The primary text stands for "the original"; the
recaptions are the record's captions of the given `roles` whose text is another one. A pair without
recaptions gives its primary text, and negatives are never drawn.
Why a mix: VeCLIP's 300 M recaptioned pairs alone reached 46.4 % on ImageNet where alt-texts, with
or without them, reached 76.2; LaCLIP mixes 1 : K, Altogether replaces 15 %, Recap-DataComp-1B 80 %.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.shards import ROLES

Captions = Sequence[Mapping[str, Any]]
RECAPTIONS = ("short", "long", "rewrite", "paraphrase")
NEGATIVES = ("negative", "tag_negative")


class Primary:
    """Always the primary text: what pack chose by role. Reads no captions and draws nothing."""

    def __call__(
        self, captions: Captions, primary: str, rng: np.random.Generator, epoch: int
    ) -> str:
        return primary


class Mix:
    """A recaption with probability `recaption`, else the primary text (Recap-DataComp-1B,
    arXiv:2406.08478: 0.8; Altogether, arXiv:2410.17251: 0.15).

    Several recaptions are equally likely. Price: none in the loader; a high share costs accuracy
    on class names and wins retrieval.
    """

    def __init__(self, *, recaption: float, roles: Sequence[str] = RECAPTIONS):
        if not 0 <= recaption <= 1:
            raise ValueError(f"recaption {recaption}: a probability is in [0, 1]")
        self.recaption, self.roles = recaption, checked_roles(roles)

    def __call__(
        self, captions: Captions, primary: str, rng: np.random.Generator, epoch: int
    ) -> str:
        texts = recaptions(captions, primary, self.roles)
        if not texts or rng.random() >= self.recaption:
            return primary
        return texts[int(rng.integers(len(texts)))]


class Uniform:
    """Each of the primary text and its K recaptions with probability 1 / (K + 1) (LaCLIP,
    arXiv:2305.20088, sec. 3.3); the primary text in the place of a choice of fewer than
    `min_words` words.
    """

    def __init__(self, *, roles: Sequence[str] = RECAPTIONS, min_words: int = 2):
        self.roles, self.min_words = checked_roles(roles), min_words

    def __call__(
        self, captions: Captions, primary: str, rng: np.random.Generator, epoch: int
    ) -> str:
        texts = [primary, *recaptions(captions, primary, self.roles)]
        chosen = texts[int(rng.integers(len(texts)))]
        return chosen if len(chosen.split()) >= self.min_words else primary


class Alternate:
    """Primary text and recaption by turns (VeCLIP, arXiv:2310.07699).

    per: "step", a fair coin each time a pair is seen (the paper throws it for the whole batch; in
    expectation the same); "epoch", the primary text in even epochs, a recaption in odd ones, so
    that each text is seen equally often.
    """

    def __init__(
        self, *, per: Literal["step", "epoch"] = "step", roles: Sequence[str] = RECAPTIONS
    ):
        if per not in ("step", "epoch"):
            raise ValueError(f"per {per!r}: step or epoch")
        self.per, self.roles = per, checked_roles(roles)

    def __call__(
        self, captions: Captions, primary: str, rng: np.random.Generator, epoch: int
    ) -> str:
        texts = recaptions(captions, primary, self.roles)
        turn = epoch % 2 if self.per == "epoch" else int(rng.integers(2))
        return texts[int(rng.integers(len(texts)))] if texts and turn else primary


OF_RECAPTIONS = (Mix, Uniform, Alternate)  # without recaptions these do nothing


def recaptions(captions: Captions, primary: str, roles: Sequence[str]) -> list[str]:
    """Texts of the given roles that are not the primary text, in the record's order."""
    return [c["text"] for c in captions if c["role"] in roles and c["text"] != primary]


def checked_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for roles that do not exist or say what is not in the image."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ValueError(f"roles {unknown}: roles are {', '.join(ROLES)}")
    wrong = [role for role in roles if role in NEGATIVES]
    if wrong:
        raise ValueError(f"roles {wrong} say what is not in the image: leave them out")
    return tuple(roles)
