"""Phases in another order are another run: the name remembers which came first."""

import pytest

from pipeline.check import composed
from pipeline.trainer.identity import claim


def config(*order, tmp_path):
    words = [f"+phases.{name}.samples_seen=25600" for name in order]
    given = ["recipe=emoji", "name=x", f"runs_dir={tmp_path}", "data.shards=y", "tokenizer.path=z"]
    return composed("train", [*given, *words])


def test_another_order_under_an_old_name(tmp_path):
    claim(config("a", "b", tmp_path=tmp_path), tmp_path)
    claim(config("a", "b", tmp_path=tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"order \['a', 'b'\], now \['b', 'a'\]"):
        claim(config("b", "a", tmp_path=tmp_path), tmp_path)
    with pytest.raises(ValueError, match="phases.c.samples_seen: was None, now 25600"):
        claim(config("a", "b", "c", tmp_path=tmp_path), tmp_path)
