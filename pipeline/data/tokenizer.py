"""Captions -> token ids: CLIP's byte-pair encoding, with OpenAI's vocabulary or a small one.

The small vocabulary is laid out like OpenAI's (256 bytes, 256 bytes that end a word, merges, SOT,
EOT), so that no caption has an unknown byte and EOT has the largest id: the text tower pools at the
argmax of the ids. Price of a small vocabulary: longer token sequences, and checkpoints that fit
only the tokenizer they were trained with.
Letters: B captions, L context length.
"""

import gzip
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as Chain
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from pipeline.shards import write_atomically

CLIP_VOCABULARY = Path(__file__).resolve().parent / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SIZE = 49408  # OpenAI use the first 48,894 of the file's 262,144 merges
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# CLIP's pattern without the names of SOT and EOT: a caption that spells them is text, or pooling
# would stop in the middle of it.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean_caption(caption: str) -> str:
    """CLIP's cleaning: mojibake, HTML entities (twice: the web escapes twice), whitespace, case."""
    if not (caption.isascii() and caption.isprintable() and "&" not in caption):
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split()).lower()


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: visible Latin-1 first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]


def byte_of_symbol() -> dict[str, int]:
    """Character of the byte alphabet -> the byte it stands for."""
    alphabet = byte_alphabet()
    visible = {symbol: ord(symbol) for symbol in alphabet if ord(symbol) < 256}
    hidden = sorted(set(range(256)) - set(visible.values()))
    return visible | dict(zip(alphabet[len(visible) :], hidden, strict=True))


def words_to_bytes() -> PreTokenizer:
    """Cleaned caption -> words, spelled in the byte alphabet."""
    words = Split(Regex(WORDS), behavior="removed", invert=True)
    return Chain([words, ByteLevel(add_prefix_space=False, use_regex=False)])


class BpeTokenizer:
    """Captions to a fixed-length batch of token ids.

    path: "clip" for the vocabulary that comes with the package, else a directory with vocab.json
        and merges.txt, as `train_bpe`, `save` and transformers write them.
    context_length: L, SOT and EOT included; a longer caption is cut and EOT kept last.
    Raises ValueError if the directory is none, or its last two ids are not SOT and EOT.
    """

    ends_with_largest_id = True  # where text_tokens find the end of a caption

    def __init__(self, *, path: str = "clip", context_length: int) -> None:
        if context_length < 3:
            raise ValueError(f"context_length {context_length} leaves no room between SOT and EOT")
        self.path, self.context_length = path, context_length
        self._vocab, self._merges = _clip_vocabulary() if path == "clip" else _read(Path(path))
        self.vocab_size = len(self._vocab)
        self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1
        if (self._vocab.get(SOT), self._vocab.get(EOT)) != (self.sot, self.eot):
            raise ValueError(
                f"{path}/vocab.json: the last two of its {self.vocab_size} ids must be {SOT} and "
                f"{EOT}; train one with pipeline.data.tokenizer.train_bpe"
            )
        self._tokenizer = Tokenizer(
            BPE(vocab=self._vocab, merges=self._merges, end_of_word_suffix=WORD_END)
        )
        self._tokenizer.pre_tokenizer = words_to_bytes()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L) int64: SOT, tokens, EOT, then 0 (also the id of "!": EOT marks the end)."""
        encoded = self._tokenizer.encode_batch_fast([clean_caption(text) for text in captions])
        tokens = torch.zeros(len(encoded), self.context_length, dtype=torch.int64)
        for row, encoding in zip(tokens, encoded, strict=True):
            ids = [self.sot, *encoding.ids[: self.context_length - 2], self.eot]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def pieces(self) -> list[tuple[bytes, bool]]:
        """The UTF-8 bytes of each id, and whether a word ends with them; SOT and EOT have none.

        Bytes may be a part of a character.
        """
        byte = byte_of_symbol()
        found = [(b"", False)] * self.vocab_size
        for piece, index in self._vocab.items():
            if index < self.sot:
                spelled = piece.removesuffix(WORD_END)
                found[index] = bytes(byte[c] for c in spelled), spelled != piece
        return found

    def save(self, directory: str | Path) -> None:
        """Write what transformers' CLIPTokenizer and AutoTokenizer load.

        transformers does not repair mojibake or HTML entities: run `clean_caption` before it.
        """
        _write(Path(directory), self._vocab, self._merges, self.context_length)


def train_bpe(
    captions: Iterable[str], *, vocab_size: int, directory: str | Path, context_length: int = 77
) -> int:
    """Learn a small vocabulary from captions and write it to `directory`, in `save`'s files.

    Deterministic: the same captions, in any order, give the same bytes. Returns the number of ids,
    below vocab_size when the captions run out of pairs to merge. `context_length` is only a note
    for transformers.
    Raises ValueError if vocab_size leaves no room for a merge.
    """
    alphabet = byte_alphabet()
    room = vocab_size - 2 * len(alphabet) - 2
    if room < 1:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {2 * len(alphabet)} bytes, SOT, EOT and at "
            f"least one merge need {2 * len(alphabet) + 3}"
        )
    # One private character per byte that ends a word. The trainer's own end_of_word_suffix numbers
    # such tokens in the order of a hash map, which would break ties between merges at random.
    ending = {symbol: chr(0xF0000 + n) for n, symbol in enumerate(alphabet)}
    spelled = dict(zip(ending.values(), (symbol + WORD_END for symbol in alphabet), strict=True))
    to_words = words_to_bytes()

    def marked() -> Iterable[list[str]]:
        for caption in captions:
            words = to_words.pre_tokenize_str(clean_caption(caption))
            yield [word[:-1] + ending[word[-1]] for word, _ in words]

    model = Tokenizer(BPE())
    model.pre_tokenizer = Split("\n", behavior="removed")  # words never hold a raw newline
    model.train_from_iterator(
        ("\n".join(words) for words in marked()),
        trainer=BpeTrainer(
            vocab_size=room + 2 * len(alphabet),
            initial_alphabet=[*alphabet, *ending.values()],
            show_progress=False,
        ),
    )
    pairs = json.loads(model.to_str())["model"]["merges"]
    merges = [tuple("".join(spelled.get(c, c) for c in half) for half in pair) for pair in pairs]
    vocab = _layout(alphabet, merges)
    _write(Path(directory), vocab, merges, context_length)
    return len(vocab)


def _layout(alphabet: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes, bytes that end a word, merges, SOT, EOT."""
    symbols = [*alphabet, *(symbol + WORD_END for symbol in alphabet)]
    symbols += dict.fromkeys(first + second for first, second in merges)
    return {symbol: n for n, symbol in enumerate([*symbols, SOT, EOT])}


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet = byte_alphabet()
    lines = gzip.decompress(CLIP_VOCABULARY.read_bytes()).decode().split("\n")
    num_merges = CLIP_VOCAB_SIZE - 2 * len(alphabet) - 2
    merges = [_pair(line) for line in lines[1 : 1 + num_merges]]  # the first line is a version
    return _layout(alphabet, merges), merges


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second


def _read(directory: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    for name in ("vocab.json", "merges.txt"):
        if not (directory / name).is_file():
            raise ValueError(
                f"no {name} in {directory}: set tokenizer.path to 'clip' (the vocabulary that "
                "comes with the package) or to a directory pipeline.data.tokenizer.train_bpe wrote"
            )
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    return vocab, [_pair(line) for line in lines if line and not line.startswith("#version")]


def _write(
    directory: Path, vocab: dict[str, int], merges: list[tuple[str, str]], context_length: int
) -> None:
    # EOT pads too, as in OpenAI's files: transformers cuts a pad token out of captions, and id 0 is
    # "!". Pooling is at the first EOT either way.
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": SOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "pad_token": EOT,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, indent=0),
        "merges.txt": "\n".join(lines),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    for name, text in files.items():
        write_atomically(directory / name, f"{text}\n".encode())
