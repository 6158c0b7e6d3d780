"""Ids as transformers gives them, from the same tokenizer.json."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.data.hf_tokenizer import HfTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s", "sit", "##ting", "猫"]
CAPTIONS = ["A red cat", "cats sitting", "", "红 猫 a red cat cats sitting sitting sitting"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """BERT's WordPiece in small, saved as transformers saves it."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    whole.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("length", [4, 7, 12])
def test_ids_are_those_of_transformers(folder, length):
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs(
        CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ours = HfTokenizer(path=str(folder), context_length=length)
    assert ours(CAPTIONS).equal(expected.input_ids)
    assert ours.vocab_size == len(WORDS)


def test_a_cut_caption_keeps_its_end_and_padding_can_be_chosen(folder):
    ours = HfTokenizer(path=str(folder / "tokenizer.json"), context_length=4, pad_id=9)
    assert ours(["a red cat", "a"]).tolist() == [[2, 4, 5, 3], [2, 4, 3, 9]]


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json at"):
        HfTokenizer(path=str(tmp_path), context_length=8)
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"names no padding: set tokenizer\.pad_id"):
        HfTokenizer(path=str(tmp_path), context_length=8)
