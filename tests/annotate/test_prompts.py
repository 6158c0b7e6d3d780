"""Prompts byte by byte, parsers on canned answers, and the order of steps."""

from collections import Counter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from curation.annotate.prompts import Answer, Ask, InContext, ask_all, cleaned, json_object
from pipeline.config import CONF, build

PAIRS = [[f"source {n}", f"target {n}"] for n in range(16)]
SAMPLES = [
    {"uid": "u1", "caption": "a {dog}", "image": b"1"},
    {"uid": "u2", "caption": None, "image": b"2"},
    {"uid": "u3", "caption": "a cat", "image": b"3"},
]


def test_laclip_prompt_is_the_papers_to_the_byte():
    prompt = InContext(examples=PAIRS)
    expected = (
        "write image captions differently,\n\n"
        "            source 3 => target 3\n\n"
        "            source 0 => target 0\n\n"
        "            source 15 => target 15\n\n"
        "            a dog =>"
    )
    assert prompt.prompt([3, 0, 15], "a d\nog") == expected


def test_examples_are_drawn_without_replacement_and_evenly():
    prompt, counts, firsts = InContext(examples=PAIRS), Counter(), Counter()
    for number in range(800):
        text = prompt.question(0, f"uid{number}", number % 4, "x", "")
        shown = [line.strip() for line in text.split("\n")[2:-1] if line.strip()]
        assert len(set(shown)) == 3
        counts.update(shown)
        firsts[shown[0]] += 1
    chi = sum((count - 150) ** 2 / 150 for count in counts.values())
    assert len(counts) == 16 and chi < 44.3  # 15 degrees of freedom, p = 1e-4
    assert len(firsts) == 16


def test_examples_belong_to_uid_copy_and_seed():
    prompt = InContext(examples=PAIRS)
    same = [prompt.question(0, "u", 0, "x", "") for _ in range(2)]
    assert same[0] == same[1]
    others = {prompt.question(0, "u", copy, "x", "") for copy in range(4)}
    others |= {InContext(examples=PAIRS, seed=1).question(0, "u", 0, "x", "")}
    assert len(others) == 5


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (" a canine on grass", "a canine on grass"),
        (" a canine on grass\n\n            a cat => a tom", "a canine on grass"),
        ("a canine => a hound", "a canine"),
        ("\n\n            a dog => a canine => a", "a dog"),
        ("=> a canine", "a canine"),
        ("", ""),  # theirs raises IndexError; here the gates say no_answer
    ],
)
def test_laclip_parser_on_canned_answers(answer, text):
    assert InContext(examples=PAIRS).drafts(answer) == [("rewrite", text, None)]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ('"A dog."', "A dog."),
        ("Caption: a\n dog", "a dog"),
        ("- a dog", "a dog"),
        ("1. a dog", "a dog"),
        ('"a" and "b"', '"a" and "b"'),
        ("3 dogs", "3 dogs"),
        ("“a dog”", "a dog"),
        ('"', '"'),
    ],
)
def test_cleaning(raw, clean):
    assert cleaned(raw) == clean


HQ = Ask(
    steps='Text: {caption}. Answer {{"long": ...}}',
    answer="json",
    fields={"long": "long", "negative": "negative", "tags": "tag", "bad": "tag_negative"},
)


def test_four_texts_of_one_answer():
    answer = 'Sure: ```json\n{"long": "A dog.", "tags": ["dog", "lawn"], "bad": 3, "x": 1}```'
    assert HQ.drafts(answer) == [
        ("long", "A dog.", None),
        ("negative", None, "no_field"),
        ("tag", "dog, lawn", None),
        ("tag_negative", None, "no_field"),
    ]
    assert [reason for *_, reason in HQ.drafts("no braces {at all")] == ["not_json"] * 4
    assert HQ.question(0, "u", 0, "a {x}", "") == 'Text: a {x}. Answer {"long": ...}'


def test_json_object_takes_the_first_whole_one():
    assert json_object('{broken {"a": 1} {"b": 2}') == {"a": 1}
    assert json_object("[1, 2]") is None


def test_steps_follow_each_other():
    asked = []

    def ask(questions):
        asked.append([(q.uid, q.text, q.image, q.blind) for q in questions])
        return [Answer(f"answer to {q.uid}", -1.0) for q in questions]

    two = Ask(steps=["plain {caption}", "again {answer} of {caption}"], role="paraphrase")
    drafts = ask_all({"two": two}, SAMPLES, ask, images=False)
    assert asked == [
        [("u1", "plain a {dog}", None, "plain "), ("u3", "plain a cat", None, "plain ")],
        [
            ("u1", "again answer to u1 of a {dog}", None, "again  of "),
            ("u3", "again answer to u3 of a cat", None, "again  of "),
        ],
    ]
    assert [d.text for d in drafts[0]] == ["answer to u1"] and drafts[0][0].score == -1.0
    assert [d.reason for d in drafts[1]] == ["no_caption"]
    assert drafts[0][0].prompt == drafts[2][0].prompt != ""


def test_a_failed_step_is_the_end_of_it():
    def ask(questions):
        return [Answer(None, reason="timeout") if q.uid == "u1" else Answer("x") for q in questions]

    two = Ask(steps=["{caption}", "{answer}"])
    drafts = ask_all({"two": two}, SAMPLES, ask, images=False)
    assert [[d.reason for d in mine] for mine in drafts] == [["timeout"], ["no_caption"], [None]]


def test_copies_and_prompts_have_draws_of_their_own():
    draws = []

    def ask(questions):
        draws.extend((q.uid, q.draw) for q in questions)
        return [Answer("x")] * len(questions)

    prompts = {"a": Ask(steps="look", copies=3), "b": Ask(steps=["look", "{answer}"])}
    drafts = ask_all(prompts, SAMPLES, ask, images=True)
    assert len(draws) == len(set(draws)) == 3 * (3 + 2)
    assert [len(mine) for mine in drafts] == [4, 4, 4]  # no {caption}: u2 is asked, too


def test_bad_prompts_are_named():
    with pytest.raises(ValueError, match=r"captoin.*\{caption\}"):
        Ask(steps="a {captoin}")
    with pytest.raises(ValueError, match="brace"):
        Ask(steps="a { b")
    with pytest.raises(ValueError, match="role"):
        Ask(steps="x", role="alternative")
    with pytest.raises(ValueError, match="fields"):
        Ask(steps="x", answer="json")
    with pytest.raises(ValueError, match="shots 3"):
        InContext(examples=PAIRS[:2])


@pytest.mark.parametrize("path", sorted(Path(CONF, "prompts").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_build_and_ask(path):
    prompts = build(OmegaConf.load(path))
    drafts = ask_all(prompts, SAMPLES, lambda qs: [Answer("{}") for _ in qs], images=True)
    assert all(drafts)
