import pyarrow as pa
import pytest

from curation.annotate.text_spotting import TextSpotting
from curation.select.parrot import Parrot, concurrent_word_rate


@pytest.mark.parametrize(
    ("caption", "spotted", "rate"),
    [
        ("SOS button", ["SOS"], 0.5),
        ("sos BUTTON", ["Sos", "button!"], 1.0),
        ("sos sos sos button", ["SOS"], 0.5),  # distinct words
        ("no smoking sign", ["NO SMOKING"], 2 / 3),  # a region may hold several words
        ("new", ["newer"], 0.0),  # whole words
        ("Straße_frei", ["STRASSE"], 0.5),
        ("a red apple", [], 0.0),
        ("!!!", ["SOS"], 0.0),
        ("", ["SOS"], 0.0),
    ],
)
def test_rate_by_hand(caption, spotted, rate):
    assert concurrent_word_rate(caption, spotted) == rate


def reasons(selector, rows):
    regions = [
        None
        if texts is None
        else [{"text": t, "confidence": c, "area_fraction": 0.1} for t, c in texts]
        for _, texts in rows
    ]
    table = pa.table(
        {
            "caption": pa.array([caption for caption, _ in rows]),
            "spotted_text": pa.array(regions, TextSpotting.columns["spotted_text"]),
        }
    )
    combined = selector.combine([selector.measure(table)])
    return selector.apply(table, combined, 0).to_pylist()


ROWS = [
    ("SOS", [("SOS", 0.9)]),
    ("SOS button", [("SOS", 0.9)]),
    ("SOS button", [("SOS", 0.6)]),
    ("no smoking sign", [("NO SMOKING", 0.9)]),
    ("a red apple", [("SOS", 0.9)]),
    ("SOS", None),
    ("SOS", []),
]


@pytest.mark.parametrize(
    ("knobs", "dropped"),
    [
        ({"max_concurrent_rate": 1.0}, []),
        ({"max_concurrent_rate": 0.5}, [0, 3]),
        ({"max_concurrent_rate": 0.4}, [0, 1, 2, 3]),
        ({"max_concurrent_rate": 0.4, "min_confidence": 0.8}, [0, 1, 3]),
        ({"max_concurrent_rate": 0.4, "min_concurrent_words": 2}, [3]),
        ({"max_concurrent_rate": 0.0}, [0, 1, 2, 3]),
    ],
)
def test_drops(knobs, dropped):
    expected = ["parrot" if i in dropped else None for i in range(len(ROWS))]
    assert reasons(Parrot(**knobs), ROWS) == expected


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_concurrent_rate": 1.1},
        {"max_concurrent_rate": 0.5, "min_concurrent_words": 0},
        {"max_concurrent_rate": 0.5, "min_confidence": -1},
    ],
)
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=next(reversed(knobs))):
        Parrot(**knobs)
