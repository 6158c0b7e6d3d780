import pyarrow as pa
import pytest
from omegaconf import OmegaConf

from curation.select.laion import Laion, host_length
from pipeline.config import CONF

GOOD = {
    "caption": "a red dog",
    "url": "https://img.example.org/dog.jpg",
    "num_bytes": 5000,
    "width": 640,
    "height": 480,
}
OFF = dict.fromkeys(("min_characters", "max_host_characters", "min_bytes", "max_pixels"))
OFF["blocked_urls"] = []


def decide(selector, *rows):
    kinds = [
        ("uid", pa.string()),
        ("caption", pa.string()),
        ("url", pa.string()),
        ("num_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
    rows = [{"uid": str(i), **GOOD, **row} for i, row in enumerate(rows)]
    table = pa.Table.from_pylist(rows, schema=pa.schema(kinds)).select(["uid", *selector.reads])
    combined = selector.combine([selector.measure(table)])
    answer = selector.apply(table, combined, 0)
    assert answer.type == pa.string()
    return answer.to_pylist()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, None),
        ({"caption": "12345"}, None),
        ({"caption": "1234"}, "short_caption"),
        ({"caption": " 1234 \n"}, "short_caption"),  # LAION strips before it counts
        ({"caption": "五个字的话"}, None),
        ({"caption": None}, "short_caption"),
        ({"num_bytes": 5000}, None),
        ({"num_bytes": 4999}, "small_file"),
        ({"width": 89_478_484, "height": 1}, None),
        ({"width": 89_478_485, "height": 1}, "large_image"),
        ({"width": 60_000, "height": 60_000}, "large_image"),  # beyond 32 bits
        ({"url": "https://" + "h" * 60 + "/dog.jpg"}, None),
        ({"url": "https://" + "h" * 61 + "/dog.jpg"}, "long_host"),
        ({"url": "https://me:secret@" + "h" * 60 + ":8080/x"}, None),
        ({"url": "https://example.org/" + "p" * 900}, None),
        ({"url": "https://example.org/DOG.SVG"}, "blocked_url"),
        ({"url": "https://example.org/dog.gif?size=2"}, "blocked_url"),
        ({"url": "data:image/png;base64,AAAA"}, "blocked_url"),
        ({"url": "javascript:void(0)"}, "blocked_url"),
        ({"url": "https://example.org/dog.webp"}, None),
        ({"url": None}, None),
        ({"url": ""}, None),
    ],
)
def test_each_rule_at_its_bound(row, reason):
    assert decide(Laion(), row) == [reason]


def test_the_first_broken_rule_is_the_reason():
    worst = {"caption": "", "url": f"https://{'h' * 70}/a.svg", "num_bytes": 1, "width": 10**9}
    knobs, found = {}, []
    for knob in (
        "min_characters",
        "blocked_urls",
        "max_host_characters",
        "min_bytes",
        "max_pixels",
    ):
        found += decide(Laion(**knobs), worst)
        knobs[knob] = OFF[knob]
    found += decide(Laion(**knobs), worst)
    assert found == [
        "short_caption",
        "blocked_url",
        "long_host",
        "small_file",
        "large_image",
        None,
    ]


def test_host_length():
    assert host_length("https://user@img.example.org:80/a") == len("img.example.org")
    assert host_length("not a url") == 0
    assert host_length("http://[broken/path") == len("[broken")


def test_the_400m_preset_blocks_what_its_workers_blocked():
    knobs = {}
    for name in ("laion", "laion_400m"):
        knobs |= OmegaConf.to_container(OmegaConf.load(f"{CONF}/select/{name}.yaml"))
    selector = Laion(**{k: v for k, v in knobs.items() if k not in ("_target_", "defaults")})
    urls = [
        "https://e.org/a.webp",
        "mailto:me@e.org",
        "https://e.org/data:x",
        f"https://{'h' * 99}",
    ]
    found = decide(selector, *({"url": url} for url in urls))
    assert found == ["blocked_url", "blocked_url", None, None]


def test_no_rows():
    assert decide(Laion()) == []


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"blocked_urls": ".svg"}, "need a list"),
        ({"blocked_urls": [""]}, "need a list"),
        ({"min_bytes": -1}, "min_bytes -1"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Laion(**knobs)
