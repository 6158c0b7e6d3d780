"""Each sampler follows its law (chi-square at p = 1e-4), and is a function of its generator."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from pipeline.config import CONF, build
from pipeline.data.captions import Alternate, Mix, Primary, Uniform
from pipeline.data.stream import generator

DRAWS = 4000
CRITICAL = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51}  # chi-square, p = 1e-4, by degrees of freedom
PRIMARY = "a dog"
BANK = [
    {"text": PRIMARY, "role": "alt"},
    {"text": "one brown dog", "role": "rewrite"},
    {"text": "a dog on grass", "role": "long"},
    {"text": "a dog, a lawn", "role": "short"},
    {"text": "a cat", "role": "negative"},
    {"text": "dog", "role": "tag"},
]


def counts(sampler, captions=BANK, epoch=0):
    draws = (sampler(captions, PRIMARY, generator(7, n), epoch) for n in range(DRAWS))
    return Counter(draws)


def assert_law(found: Counter, expected: dict[str, float]):
    assert set(found) <= set(expected), found
    chi = sum((found[t] - DRAWS * p) ** 2 / (DRAWS * p) for t, p in expected.items())
    assert chi < CRITICAL[len(expected) - 1], (chi, found)


RECAPTIONS = ["one brown dog", "a dog on grass", "a dog, a lawn"]


def test_primary_draws_nothing():
    rng = np.random.default_rng(0)
    assert Primary()(BANK, PRIMARY, rng, 3) == PRIMARY
    assert rng.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("p", [0.15, 0.8])
def test_mix(p):
    assert_law(counts(Mix(recaption=p)), {PRIMARY: 1 - p, **dict.fromkeys(RECAPTIONS, p / 3)})


def test_mix_at_its_ends():
    assert set(counts(Mix(recaption=0))) == {PRIMARY}
    assert PRIMARY not in counts(Mix(recaption=1))


def test_roles_are_obeyed():
    found = counts(Mix(recaption=0.5, roles=["tag"]))
    assert_law(found, {PRIMARY: 0.5, "dog": 0.5})


def test_uniform_over_k_plus_1():
    assert_law(counts(Uniform()), dict.fromkeys([PRIMARY, *RECAPTIONS], 1 / 4))


def test_uniform_falls_back_from_one_word():
    bank = [*BANK, {"text": "dog", "role": "rewrite"}]
    law = {PRIMARY: 2 / 5, **dict.fromkeys(RECAPTIONS, 1 / 5)}
    assert_law(counts(Uniform(), bank), law)
    assert "dog" in counts(Uniform(min_words=1), bank)


def test_alternate_per_step():
    law = {PRIMARY: 1 / 2, **dict.fromkeys(RECAPTIONS, 1 / 6)}
    assert_law(counts(Alternate()), law)


def test_alternate_per_epoch():
    sampler = Alternate(per="epoch")
    assert set(counts(sampler, epoch=4)) == {PRIMARY}
    assert_law(counts(sampler, epoch=5), dict.fromkeys(RECAPTIONS, 1 / 3))


ALL = [Primary(), Mix(recaption=1), Uniform(), Alternate(), Alternate(per="epoch")]


@pytest.mark.parametrize("sampler", ALL, ids=lambda s: type(s).__name__)
def test_without_recaptions_the_primary_text(sampler):
    bank = [BANK[0], BANK[4]]
    assert {sampler(bank, PRIMARY, generator(n), 1) for n in range(50)} == {PRIMARY}
    assert sampler([], PRIMARY, generator(0), 1) == PRIMARY


@pytest.mark.parametrize("sampler", ALL, ids=lambda s: type(s).__name__)
def test_a_function_of_its_generator(sampler):
    first = [sampler(BANK, PRIMARY, generator("s", n), 1) for n in range(50)]
    assert first == [sampler(BANK, PRIMARY, generator("s", n), 1) for n in range(50)]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="recaption 1.5"):
        Mix(recaption=1.5)
    with pytest.raises(ValueError, match="alternative"):
        Uniform(roles=["alternative"])
    with pytest.raises(ValueError, match="not in the image"):
        Alternate(roles=["long", "negative"])
    with pytest.raises(ValueError, match="per 'batch'"):
        Alternate(per="batch")


@pytest.mark.parametrize("path", sorted(Path(CONF, "captions").glob("*.yaml")), ids=str)
def test_presets_build_and_draw(path):
    sampler = build(OmegaConf.load(path))
    assert sampler(BANK, PRIMARY, generator(0), 0) in [PRIMARY, *RECAPTIONS]
