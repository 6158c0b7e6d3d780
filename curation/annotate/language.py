"""Annotator: the language of a caption, for the filters of DataComp and LAION and for balancing by
language (MetaCLIP 2, arXiv:2507.22062).

Facts only: which languages stay, and from what score on, is the selectors' business.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa

UNDETERMINED = "other"  # MetaCLIP 2 files captions without a usable label under it


class LanguageIdentifier(Protocol):
    """An engine. Heavy state is loaded by the first `identify` and must not be pickled.

    To use another one (fastText, a server ...), write such a class and name it in the YAML:
    `annotate.language.identifier._target_=my.module.Identifier`.
    """

    @property
    def inputs(self) -> dict[str, str]:
        """Files whose content the answers depend on, such as the model: name -> path."""
        ...

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float] | None]:
        """(language code, confidence in [0, 1]) per text, each judged alone; None where the text
        says nothing of its language. Texts hold a letter and no newline.
        """
        ...


class Py3LangId:
    """py3langid: naive Bayes over byte n-grams, 139 languages, the model inside the package.

    languages: only these codes (ISO 639) are candidates, two or more; null: all. Short captions
        gain much: see docs/curation/filters.md.
    Confidence: the posterior, tempered by length; text without any known n-gram is undetermined, as
        is what the model calls `zxx` (no linguistic content).
    Price: 0.6 CPU seconds and 120 MB to load, then 17,000 captions of 60 characters a second and
        core.
    """

    def __init__(self, *, languages: Sequence[str] | None = None):
        if isinstance(languages, str) or (languages is not None and len(set(languages)) < 2):
            raise ValueError(
                f"languages {languages!r}: need a list of two or more codes such as [en, de], or "
                "null for all"
            )
        self.languages = None if languages is None else sorted(set(languages))
        self._model: Any = None
        self._blank: tuple[str, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}

    @property
    def inputs(self) -> dict[str, str]:
        """The model file: another release with another model gives another fingerprint.

        Raises ValueError when the package is not installed.
        """
        spec = find_spec("py3langid")
        if spec is None or spec.origin is None:
            raise ValueError(
                "annotate.language needs py3langid: pip install py3langid, or choose another "
                "identifier._target_"
            )
        return {"model": str(Path(spec.origin).parent / "data" / "model.npz.xz")}

    def _build(self) -> None:
        path = self.inputs["model"]
        from py3langid.langid import LanguageIdentifier as Model

        model = Model.from_modelpath(path, norm_probs=True)
        unknown = sorted(set(self.languages or ()) - set(model.labels))
        if unknown:
            raise ValueError(
                f"languages {unknown}: py3langid does not know them; it knows "
                f"{', '.join(sorted(model.labels))}"
            )
        model.set_languages(self.languages)
        # what it answers when it has seen no feature: the prior, whichever label is the first
        self._blank = model.classify("")
        self._model = model

    def identify(self, texts: Sequence[str]) -> list[tuple[str, float] | None]:
        """As the protocol says."""
        if self._model is None:
            self._build()
        found = [self._model.classify(text) for text in texts]
        return [None if f == self._blank or f[0] == "zxx" else f for f in found]


class Language:
    """`language`, a code of the identifier, and `language_score`, its confidence.

    A caption without a letter of any script, or of which the identifier cannot say anything, has
    language "other" and a null score. Every caption has a language.
    identifier: a `LanguageIdentifier`; by default py3langid with all its languages.
    max_characters: only the first ones are looked at (LAION-5B cuts alt texts there); null: all.
    A newline is a space for the identifier, as in DataComp.
    Scores are rounded to 1e-5, below which they depend on the order of a sum.
    Price: the identifier's.
    """

    name = "language"
    version = 1
    needs_images = False
    reads = ("caption",)
    columns: ClassVar[dict[str, pa.DataType]] = {
        "language": pa.string(),
        "language_score": pa.float32(),
    }

    def __init__(
        self,
        *,
        identifier: LanguageIdentifier | None = None,
        max_characters: int | None = 2000,
    ):
        if max_characters is not None and max_characters < 1:
            raise ValueError(f"max_characters {max_characters}: need at least 1, or null")
        self.identifier = Py3LangId() if identifier is None else identifier
        self.max_characters = max_characters

    @property
    def inputs(self) -> dict[str, str]:
        """The identifier's files."""
        return {f"identifier.{key}": path for key, path in self.identifier.inputs.items()}

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Identify every caption. Raises ValueError for an answer that is none."""
        rows = [{"language": UNDETERMINED, "language_score": None} for _ in batch]
        texts = [(s["caption"] or "")[: self.max_characters].replace("\n", " ") for s in batch]
        spoken = [i for i, text in enumerate(texts) if any(map(str.isalpha, text))]
        found = self.identifier.identify([texts[i] for i in spoken])
        if len(found) != len(spoken):
            raise ValueError(
                f"{type(self.identifier).__name__} gave {len(found)} answers for "
                f"{len(spoken)} texts"
            )
        for i, answer in zip(spoken, found, strict=True):
            if answer is not None:
                code, score = answer
                if not code or not 0.0 <= score <= 1.0:
                    raise ValueError(
                        f"{type(self.identifier).__name__} answered {answer!r} for "
                        f"{batch[i]['uid']}: need (code, confidence in [0, 1]) or None"
                    )
                rows[i] = {"language": code, "language_score": round(score, 5)}
        return rows
