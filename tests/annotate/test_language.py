import math
import pickle

import pytest

from curation.annotate.language import Language, Py3LangId

SPOKEN = {
    "en": "a photo of a dog running on the beach in the evening",
    "de": "ein roter Regenschirm steht im Garten hinter dem Haus",
    "fr": "une photo d'un chien\nsur la plage",
    "es": "un perro corre por la playa mientras cae la tarde",
    "ru": "красная собака бежит по берегу моря вечером",
    "ja": "猫の写真",
    "zh": "强大的猫在草地上",
    "th": "แมวนั่งอยู่บนหญ้า",
    "ko": "공원에서 뛰어노는 강아지",
}


ALL = Py3LangId()  # loads its model once, when first asked


def rows(captions, **knobs):
    annotator = Language(**({"identifier": ALL} | knobs))
    return annotator.annotate(
        [{"uid": str(i), "caption": caption} for i, caption in enumerate(captions)]
    )


class Fake:
    """Says what it was given."""

    inputs = {"model": "/nowhere"}  # noqa: RUF012

    def __init__(self, answers=None):
        self.answers, self.texts = answers, []

    def identify(self, texts):
        self.texts += texts
        return [("xx", 0.5)] * len(texts) if self.answers is None else self.answers


def test_languages_of_plain_sentences():
    found = rows(SPOKEN.values())
    assert [row["language"] for row in found] == list(SPOKEN)
    assert all(0.3 < row["language_score"] <= 1.0 for row in found)


@pytest.mark.parametrize(
    "caption", ["", "   ", "12345", "...", "😀 !!", "2023-11-04_17:22", None, "\n", "IMG_0001.jpg"]
)
def test_nothing_to_tell_is_other_without_a_score(caption):
    """No letter at all, or (the last) letters of which the model knows no n-gram."""
    assert rows([caption]) == [{"language": "other", "language_score": None}]


def test_undetermined_among_few_languages_too():
    """The answer without features is the prior, whatever label happens to be the first."""
    engine = Py3LangId(languages=["sr", "en"])
    assert rows(["IMG_0001.jpg", SPOKEN["en"]], identifier=engine) == [
        {"language": "other", "language_score": None},
        {"language": "en", "language_score": pytest.approx(1.0, abs=0.02)},
    ]


def test_fewer_candidates_decide_short_captions():
    short = ["red umbrella", "hot dog", "sunset"]
    few = rows(short, identifier=Py3LangId(languages=["en", "zh", "ru"]))
    assert [row["language"] for row in few] == ["en"] * 3
    assert [row["language"] for row in rows(short)] != ["en"] * 3


def test_each_caption_is_judged_alone():
    captions = [*SPOKEN.values(), "", "12"] * 2
    assert rows(captions) == [row for caption in captions for row in rows([caption])]
    assert rows(captions[::-1]) == rows(captions)[::-1]


def test_newlines_are_spaces_and_long_captions_cut():
    engine = Fake()
    rows(["a\nb", "1", "abcdef", "123x"], identifier=engine, max_characters=3)
    assert engine.texts == ["a b", "abc"]
    engine = Fake()
    rows(["a" * 3000], identifier=engine, max_characters=None)
    assert engine.texts == ["a" * 3000]


def test_another_identifier():
    found = rows(["a", "b", "?"], identifier=Fake([("xx", 0.1234567), None]))
    assert found == [
        {"language": "xx", "language_score": 0.12346},
        {"language": "other", "language_score": None},
        {"language": "other", "language_score": None},
    ]
    assert Language(identifier=Fake()).inputs == {"identifier.model": "/nowhere"}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "Fake gave 0 answers for 1 texts"),
        ([("en", 1.5)], "answered .* for 0"),
        ([("en", math.nan)], "answered"),
        ([("", 0.5)], "answered"),
    ],
)
def test_an_identifier_that_answers_nonsense(answers, message):
    with pytest.raises(ValueError, match=message):
        rows(["a"], identifier=Fake(answers))


def test_the_model_is_not_pickled_and_is_an_input():
    annotator = Language()
    before = len(pickle.dumps(annotator))
    first = annotator.annotate([{"uid": "0", "caption": SPOKEN["de"]}])
    copy = pickle.loads(pickle.dumps(annotator))
    assert len(pickle.dumps(annotator)) < before + 200
    assert copy.annotate([{"uid": "0", "caption": SPOKEN["de"]}]) == first
    (path,) = annotator.inputs.values()
    assert path.endswith("model.npz.xz")


def test_bad_knobs():
    for languages in ("en", ["en"], [], ["en", "en"]):
        with pytest.raises(ValueError, match="two or more"):
            Py3LangId(languages=languages)
    with pytest.raises(ValueError, match="'klingon'.*it knows ace, af"):
        Py3LangId(languages=["en", "klingon"]).identify(["a"])
    with pytest.raises(ValueError, match="max_characters 0"):
        Language(max_characters=0)
