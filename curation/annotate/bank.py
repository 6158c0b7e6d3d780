"""A caption bank: what one source has to say of a pair, and what of it was refused and why.

A bank `b` is two columns: `captions_b` (CAPTIONS: travels into the shards beside the pool's own
text) and `b_refused`, so that asked == kept + sum(refused by reason) for every pair.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.shards import CAPTION, CAPTIONS, ROLES

REFUSED = pa.list_(pa.struct([("text", pa.string()), ("reason", pa.string())]))


class Candidate(NamedTuple):
    """A caption on its way into a bank; with a reason it is refused. prompt: hash, if there was
    one.
    """

    role: str
    text: str | None
    score: float | None = None
    reason: str | None = None
    prompt: str | None = None


def text_hash(text: str) -> str:
    """16 hex digits that name a prompt or a list."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Bank:
    """name: letters, digits and underscores; it is part of the columns' names.

    source: who wrote the captions ("caption", "rewrite", ...). model: hash of the weights, or the
    server's name. sampling: decoding settings.
    """

    def __init__(
        self,
        *,
        name: str,
        source: str,
        model: str | None = None,
        sampling: dict[str, Any] | None = None,
    ):
        self.columns = bank_columns(name)
        self.captions, self.refused = self.columns
        self.origin = {
            "source": source,
            "lang": None,
            "model": model,
            "sampling": None if sampling is None else json.dumps(sampling, sort_keys=True),
        }

    def row(self, candidates: Iterable[Candidate]) -> dict[str, Any]:
        """The two columns of one pair; a candidate with a reason is refused."""
        kept, refused = [], []
        for found in candidates:
            assert found.role in ROLES, found.role
            if found.reason is None:
                caption = {**found._asdict(), **self.origin}
                kept.append({key: caption[key] for key in CAPTION.names})
            else:
                refused.append({"text": found.text, "reason": found.reason})
        return {self.captions: kept, self.refused: refused}


def bank_columns(name: str) -> dict[str, pa.DataType]:
    """Names and types of a bank's two columns. Raises ValueError for a name that is no word."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"bank {name!r}: use lower-case letters, digits and underscores")
    return {f"captions_{name}": CAPTIONS, f"{name}_refused": REFUSED}
