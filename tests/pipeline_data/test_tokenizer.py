"""BpeTokenizer against a brute force, and against transformers' CLIPTokenizer."""

import html
import itertools
import pickle
import random
from pathlib import Path

import ftfy
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, CLIPTokenizer

from pipeline.data.tokenizer import (
    CLIP_VOCAB_SIZE,
    EOT,
    SOT,
    BpeTokenizer,
    byte_alphabet,
    clean_caption,
    train_bpe,
)

POOL = Path(__file__).parents[2] / "examples" / "emoji" / "pool"
PIECES = [
    "A photo of a dog",
    "it's I'll they've WE'RE can't o'clock 'tis",
    "🏳️‍🌈 👩🏽‍🚀 🇨🇭 😀😀",
    "猫が好き 你好,世界 한국어 ไทย",
    "fish &amp; chips &lt;3 &#128512; caf&eacute; &amp;amp;",
    "naïve CAFÉ Ångström ﬁne ½ ² Ⅷ",
    "Ünïcödé “quotes” — dash… ‘x’",
    "donâ€™t schÃ¶n",
    "1234567890 3.14 1,000 2024-01-01",
    "!!!??? ... #tag @user http://a.b/c?d=e&f=g",
    "ΣΊΣΥΦΟΣ ПРИВЕТ İstanbul ẞ",
    "tab\tnew\nline  spaces\u00a0nbsp\u200bzero",
    "e\u0301 n\u0303 \u1112\u1161\u11ab",
    "ﷺ ٣ नमस्ते שלום",
    "IMG_2034.JPG_600x600",
    "",
]


def pool_captions() -> list[str]:
    shard = sorted(POOL.glob("*.parquet"))[0]
    return pq.read_table(shard, columns=["caption"])["caption"].to_pylist()


def varied_captions() -> list[str]:
    rng = random.Random(0)
    mixed = [" ".join(rng.choices(PIECES, k=rng.randint(1, 4))) for _ in range(700)]
    return PIECES + mixed + pool_captions()[:700]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(pool_captions() + PIECES, vocab_size=1500, directory=directory)
    return directory


def words_until_eot(tokens: torch.Tensor, eot: int) -> list[list[int]]:
    return [row[: row.index(eot) + 1] for row in tokens.tolist()]


@pytest.mark.parametrize("path", ["clip", "small"])
def test_equals_transformers_tokenizer(path, small, tmp_path):
    path = str(small) if path == "small" else path
    tokenizer = BpeTokenizer(path=path, context_length=40)
    tokenizer.save(tmp_path)
    captions = varied_captions()
    assert len(captions) > 1000
    ours = words_until_eot(tokenizer(captions), tokenizer.eot)
    for loader in (CLIPTokenizer, AutoTokenizer):
        theirs = loader.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.sot, tokenizer.eot)
        cleaned = [clean_caption(caption) for caption in captions]
        ids = theirs(cleaned, truncation=True, max_length=40)["input_ids"]
        assert ours == ids


def test_equals_transformers_tokenizer_from_the_same_vocabulary_and_merges(small):
    tokenizer = BpeTokenizer(path=str(small), context_length=30)
    theirs = CLIPTokenizer(vocab=tokenizer._vocab, merges=tokenizer._merges)
    captions = varied_captions()
    ids = theirs([clean_caption(c) for c in captions], truncation=True, max_length=30)["input_ids"]
    assert words_until_eot(tokenizer(captions), tokenizer.eot) == ids


def test_equals_byte_pair_merging_by_hand(small):
    tokenizer = BpeTokenizer(path=str(small), context_length=64)
    order = {pair: n for n, pair in enumerate(tokenizer._merges)}

    def merged(word: str) -> list[str]:
        parts = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [
                (order[pair], n)
                for n, pair in enumerate(itertools.pairwise(parts))
                if pair in order
            ]
            if not pairs:
                return parts
            _, n = min(pairs)
            parts[n : n + 2] = [parts[n] + parts[n + 1]]

    for caption in ["medium skin tone", "woman firefighter", "banana", "the the", "xylophonez"]:
        ids = [tokenizer._vocab[part] for word in caption.split() for part in merged(word)]
        expected = [tokenizer.sot, *ids, tokenizer.eot]
        assert words_until_eot(tokenizer([caption]), tokenizer.eot) == [expected]


def test_known_ids_of_clips_vocabulary():
    # "a photo of a cat" as published with CLIP's notebook
    tokens = BpeTokenizer(context_length=8)(["A photo of\n a CAT"])
    assert tokens.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 0]]


def test_no_byte_is_unknown(small):
    """Every cleaned caption can be read back from its ids, whatever its script."""
    tokenizer = BpeTokenizer(path=str(small), context_length=400)
    symbols = {n: symbol for symbol, n in tokenizer._vocab.items()}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    as_byte = dict(zip(byte_alphabet(), visible + hidden, strict=True))
    for caption in PIECES:
        (ids,) = words_until_eot(tokenizer([caption]), tokenizer.eot)
        assert ids.index(tokenizer.eot) == len(ids) - 1
        text = "".join(symbols[n] for n in ids[1:-1]).replace("</w>", "")
        assert bytes(as_byte[c] for c in text).decode() == "".join(clean_caption(caption).split())


def test_layout_of_the_ids(small):
    for path in ("clip", str(small)):
        tokenizer = BpeTokenizer(path=path, context_length=10)
        assert tokenizer._vocab[SOT] == tokenizer.sot == tokenizer.vocab_size - 2
        assert tokenizer._vocab[EOT] == tokenizer.eot == tokenizer.vocab_size - 1
        assert sorted(tokenizer._vocab.values()) == list(range(tokenizer.vocab_size))
    assert BpeTokenizer(context_length=10).vocab_size == CLIP_VOCAB_SIZE


def test_shape_padding_and_cut(small):
    tokenizer = BpeTokenizer(path=str(small), context_length=6)
    tokens = tokenizer(["", "dog", "one two three four five six seven eight"])
    assert tokens.shape == (3, 6)
    assert tokens.dtype == torch.int64
    assert tokens[0].tolist() == [tokenizer.sot, tokenizer.eot, 0, 0, 0, 0]
    assert tokens[2, 0] == tokenizer.sot
    assert tokens[2, -1] == tokenizer.eot
    assert tokens.argmax(dim=1).tolist()[::2] == [1, 5]
    long = BpeTokenizer(path=str(small), context_length=64)
    assert (
        tokens[2, :-1].tolist() == long(["one two three four five six seven eight"])[0, :5].tolist()
    )


def test_an_empty_batch_has_the_right_shape(small):
    assert BpeTokenizer(path=str(small), context_length=6)([]).shape == (0, 6)


def test_names_of_special_tokens_in_a_caption_are_text(small):
    """A caption that spells EOT must not move the place where the text tower pools."""
    for path in ("clip", str(small)):
        tokenizer = BpeTokenizer(path=path, context_length=32)
        tokens = tokenizer([f"a {SOT} b {EOT} dog"])[0]
        assert (tokens == tokenizer.eot).sum() == 1
        assert (tokens == tokenizer.sot).sum() == 1


def test_cleaning_is_clips():
    for caption in varied_captions():
        slow = html.unescape(html.unescape(ftfy.fix_text(caption)))
        assert clean_caption(caption) == " ".join(slow.split()).lower()
    # ftfy leaves entities alone beside a "<", CLIP then undoes two layers
    assert clean_caption("1 < 2 &amp;amp; &amp;amp;amp;") == "1 < 2 & &amp;"
    assert clean_caption("  Fish &amp;amp; CHIPS \n donâ€™t ") == "fish & chips don't"


def test_ascii_needs_no_repair():
    """The shortcut past ftfy is exact for every printable ASCII character and pair of them."""
    characters = [chr(n) for n in range(32, 127)]
    for first in characters:
        text = "".join(first + second for second in characters if "&" not in (first, second))
        assert ftfy.fix_text(text) == html.unescape(text) == text


@pytest.mark.parametrize("caption", ["x" * 100_000, "a b " * 25_000, "\ud800 lone", "\x00\x1b[1m"])
def test_hostile_captions(small, caption):
    tokenizer = BpeTokenizer(path=str(small), context_length=16)
    tokens = tokenizer([caption])
    assert (tokens == tokenizer.eot).sum() == 1


def test_training_is_a_function_of_the_captions(tmp_path):
    """The same files from any order of the captions, in this process or another."""
    captions = pool_captions()
    shuffled = random.Random(1).sample(captions, len(captions))
    for name, order in (("first", captions), ("second", shuffled)):
        train_bpe(iter(order), vocab_size=1200, directory=tmp_path / name)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_training_merges_the_most_frequent_pair_first(tmp_path):
    size = train_bpe(["ab ab ab cb", "cb ab"], vocab_size=600, directory=tmp_path)
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert merges == ["#version: 0.2", "a b</w>", "c b</w>"]  # four of the one, two of the other
    assert size == 512 + 2 + 2


def test_more_vocabulary_makes_shorter_sequences(tmp_path):
    captions = pool_captions()
    lengths = []
    for vocab_size in (520, 800, 2000):
        assert train_bpe(captions, vocab_size=vocab_size, directory=tmp_path) == vocab_size
        tokenizer = BpeTokenizer(path=str(tmp_path), context_length=64)
        lengths.append(int((tokenizer(captions) > 0).sum()))
    assert lengths[0] > lengths[1] > lengths[2]


def test_a_tokenizer_survives_pickling(small):
    tokenizer = BpeTokenizer(path=str(small), context_length=16)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(again(PIECES), tokenizer(PIECES))


def test_saving_and_loading_again_changes_nothing(small, tmp_path):
    tokenizer = BpeTokenizer(path=str(small), context_length=16)
    tokenizer.save(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == (small / "vocab.json").read_bytes()
    assert (tmp_path / "merges.txt").read_bytes() == (small / "merges.txt").read_bytes()
    again = BpeTokenizer(path=str(tmp_path), context_length=16)
    assert torch.equal(again(PIECES), tokenizer(PIECES))


def test_what_a_user_can_get_wrong(small, tmp_path):
    with pytest.raises(ValueError, match=r"no vocab\.json in .*set tokenizer\.path to 'clip'"):
        BpeTokenizer(path=str(tmp_path), context_length=16)
    with pytest.raises(ValueError, match="context_length 2"):
        BpeTokenizer(context_length=2)
    with pytest.raises(ValueError, match=r"vocab_size 514 is too small.*515"):
        train_bpe(["a"], vocab_size=514, directory=tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b</w>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="last two of its 2 ids"):
        BpeTokenizer(path=str(tmp_path), context_length=16)
