"""Each gate refuses what it is for, names it, and lets plain captions through."""

import pytest

from curation.annotate.gates import Gates, words_of
from curation.annotate.language import LanguageIdentifier

PROMPT = "Please generate a detailed caption of this image. Please be as descriptive as possible."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A brown dog runs over wet grass.", None),
        ("a very very old car", None),  # twice is emphasis
        ("the cat and the dog and the bird and the fish and the fox and the hen", None),
        ("一只棕色的狗在草地上奔跑", None),
        (None, "no_answer"),
        ("  \n", "no_answer"),
        ("dog", "too_short"),
        ("!!! ???", "too_short"),
        ("a very very very old car", "repetition"),
        ("a red car, a red car, a red car", "repetition"),
        ("狗狗狗狗狗狗狗狗狗狗狗狗狗狗", "repetition"),
        ("I'm sorry, but I cannot see the image.", "refusal"),
        ("As an AI model I have no eyes", "refusal"),
        ("I’m sorry to say so", "refusal"),
        ("a man asks: are you unable-bodied", None),
        ("Please be as descriptive as possible of this dog", None),  # six words of the prompt
        ("Generate a detailed caption of this image please", "copied_prompt"),
        ("a dog on a lawn", "unchanged"),
        ("A dog, on a lawn!", "unchanged"),
    ],
)
def test_by_hand(text, reason):
    assert Gates().reason(text, asked=PROMPT, original="A dog on a lawn") == reason


def test_long_loops_of_few_words_are_repetition():
    drifting = "a dog in a park with a dog in a park by a dog in a park near a dog in a park"
    assert Gates().reason(drifting) == "repetition"
    assert Gates(min_distinct=0).reason(drifting) is None


def test_too_long():
    text = " ".join(f"word{n}" for n in range(11))
    assert Gates(max_words=10).reason(text) == "too_long"
    assert Gates(max_words=11).reason(text) is None


def test_the_pools_caption_inside_the_prompt_may_be_used():
    original = "two dogs run along a wide beach at low tide"
    asked = f"Say this in other words: {original}"
    text = f"{original} in the evening"
    assert Gates().reason(text, asked=asked, original=original) is None
    assert Gates().reason(text, asked=asked) == "copied_prompt"


def test_knobs_open_the_gates():
    gates = Gates(min_words=1, unchanged=False, refusals=[], max_repeats=9)
    for text in ("dog", "a dog on a lawn", "I'm sorry", "no no no no"):
        assert gates.reason(text, original="a dog on a lawn") is None


class Umlauts:
    """A language identifier that knows German by its letters."""

    inputs: dict[str, str] = {}  # noqa: RUF012

    def identify(self, texts):
        return [None if "?" in t else ("de" if "ü" in t else "en", 0.9) for t in texts]


def test_language():
    identifier: LanguageIdentifier = Umlauts()
    gates = Gates(language=identifier, languages=["en"])
    assert gates.reason("a green door") is None
    assert gates.reason("eine grüne Tür") == "language"
    assert gates.reason("what now?") is None  # undetermined is no reason
    with pytest.raises(ValueError, match="belong together"):
        Gates(language=identifier)


def test_words():
    assert words_of("A dog's well-known bone!") == ["a", "dog's", "well-known", "bone"]
    assert words_of("一只棕色的狗在草地上奔跑跳") == list("一只棕色的狗在草地上奔跑跳")


@pytest.mark.parametrize(
    "knob", [{"min_words": 0}, {"max_words": 1}, {"max_repeats": 0}, {"min_distinct": 2}]
)
def test_bad_knobs_are_named(knob):
    with pytest.raises(ValueError, match=next(iter(knob))):
        Gates(**knob)
