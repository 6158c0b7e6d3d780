"""Which generated captions are refused, and why: the check that no published recaptioning had.

Reasons: no_answer, too_short, too_long, repetition, refusal, copied_prompt, unchanged, language.
A caption is what a model says; refused ones are counted in `<bank>_refused`, never repaired.
"""

import re
from collections.abc import Sequence

from curation.annotate.language import LanguageIdentifier

# How instruction-tuned models say that they did not do it; matched at word boundaries.
REFUSALS = (
    "i cannot",
    "i can't",
    "i can not",
    "i'm sorry",
    "i am sorry",
    "i apologize",
    "as an ai",
    "as a language model",
    "unable to",
    "i don't have access",
    "i do not have access",
    "please provide",
    "no image provided",
    "i'd be happy to",
    "sure, here",
    "here is a",
    "here's a",
)
# Thai, Lao, Burmese, Khmer; kana, CJK
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’-][^\W{UNSPACED}]+)*")


class Gates:
    """min_words, max_words: of the caption. max_repeats: a run of 1 to 6 words may stand this often
    in a row. min_distinct: share of different three-word runs in a caption of 12 words or more.
    refusals: phrases (lower case) that mark an answer about the task. max_copied_words: longest run
    of words that may come from the prompt, its caption excepted. unchanged: refuse a text that is
    the pool's own caption. language: an identifier of curation/annotate/language.py, `languages`
    the codes that are welcome (undetermined ones are too); None: no check.
    In scripts without spaces (Chinese, Thai) each character counts as a word.
    """

    def __init__(
        self,
        *,
        min_words: int = 2,
        max_words: int = 256,
        max_repeats: int = 2,
        min_distinct: float = 0.6,
        refusals: Sequence[str] = REFUSALS,
        max_copied_words: int = 6,
        unchanged: bool = True,
        language: LanguageIdentifier | None = None,
        languages: Sequence[str] = (),
    ):
        if not 1 <= min_words <= max_words or max_repeats < 1 or max_copied_words < 1:
            raise ValueError(
                f"min_words {min_words}, max_words {max_words}, max_repeats {max_repeats}, "
                f"max_copied_words {max_copied_words}: need 1 <= min <= max, and at least 1"
            )
        if not 0 <= min_distinct <= 1:
            raise ValueError(f"min_distinct {min_distinct}: a fraction in [0, 1]")
        if (language is None) != (not languages):
            raise ValueError("language and languages belong together: give both or neither")
        self.min_words, self.max_words = min_words, max_words
        self.max_repeats, self.min_distinct = max_repeats, min_distinct
        spelled = "|".join(re.escape(phrase.lower()) for phrase in refusals)
        self.refusal = re.compile(rf"(?<!\w)(?:{spelled})(?!\w)") if refusals else None
        self.max_copied_words, self.unchanged = max_copied_words, unchanged
        self.language, self.languages = language, frozenset(languages)

    def reason(self, text: str | None, *, asked: str = "", original: str = "") -> str | None:
        """Why this caption is refused, or None. asked: what the model read; original: the pool's
        caption.
        """
        if text is None or not text.strip():
            return "no_answer"
        words = words_of(text)
        if len(words) < self.min_words:
            return "too_short"
        if len(words) > self.max_words:
            return "too_long"
        if self.refusal and self.refusal.search(text.lower().replace("’", "'")):
            return "refusal"
        if self._repeats(words):
            return "repetition"
        task = asked.replace(original, " ") if original else asked
        if self._copies(words, words_of(task)):
            return "copied_prompt"
        if self.unchanged and words == words_of(original):
            return "unchanged"
        return "language" if self._foreign(text) else None

    def _foreign(self, text: str) -> bool:
        if self.language is None or not any(character.isalpha() for character in text):
            return False
        (found,) = self.language.identify([" ".join(text.split())])
        return found is not None and found[0] not in self.languages

    def _repeats(self, words: list[str]) -> bool:
        for size in range(1, 7):
            streak = 0  # words that equal the word `size` places before: n repeats are size * n
            for place in range(size, len(words)):
                streak = streak + 1 if words[place] == words[place - size] else 0
                if streak >= size * self.max_repeats:
                    return True
        runs = list(zip(words, words[1:], words[2:], strict=False))
        return len(words) >= 12 and len(set(runs)) < self.min_distinct * len(runs)

    def _copies(self, words: list[str], asked: list[str]) -> bool:
        size = self.max_copied_words + 1
        theirs = {tuple(asked[n : n + size]) for n in range(len(asked) - size + 1)}
        return any(tuple(words[n : n + size]) in theirs for n in range(len(words) - size + 1))


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; characters of scripts without spaces one by one."""
    return WORD.findall(text.lower())
