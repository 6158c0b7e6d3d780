"""Captions -> token ids, by any tokenizer that Hugging Face's libraries save: BERT's WordPiece,
XLM-V's and SigLIP's SentencePiece.

Letters: B captions, L context length.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.shards import write_atomically, write_json


class HfTokenizer:
    """Captions to a fixed-length batch of token ids, as the file's own rules have it.

    path: a tokenizer.json or the directory it is in, as transformers' fast tokenizers save it.
    context_length: L, the special tokens that the file adds included; a longer caption is cut and
        they stay.
    pad_id: fills the rest of a row; null for the file's own. Give a text tower that knows padding
        the same one.
    Raises ValueError for a path without the file, and a file that names no padding where pad_id is
    null.
    """

    ends_with_largest_id = False  # where text_tokens find the end of a caption

    def __init__(self, *, path: str, context_length: int, pad_id: int | None = None) -> None:
        file = Path(path)
        file = file if file.is_file() else file / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"no tokenizer.json at {path}: set tokenizer.path to a directory that "
                "transformers' AutoTokenizer.save_pretrained wrote"
            )
        self.path, self.context_length = path, context_length
        self._tokenizer = Tokenizer.from_file(str(file))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_id = _pad_id(self._tokenizer, path) if pad_id is None else pad_id
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.no_padding()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L) int64, padded with pad_id."""
        tokens = torch.full((len(captions), self.context_length), self.pad_id)
        encoded = self._tokenizer.encode_batch_fast(list(captions))
        for row, encoding in zip(tokens, encoded, strict=True):
            row[: len(encoding.ids)] = torch.tensor(encoding.ids)
        return tokens

    def save(self, directory: str | Path) -> None:
        """Write what transformers' AutoTokenizer loads; it pads to context_length, as here, with
        padding="max_length".
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self._tokenizer.id_to_token(self.pad_id),
            "model_max_length": self.context_length,
            "padding_side": "right",
            "model_input_names": ["input_ids"],
        }
        write_atomically(Path(directory) / "tokenizer.json", self._tokenizer.to_str().encode())
        write_json(Path(directory) / "tokenizer_config.json", config)


def _pad_id(tokenizer: Tokenizer, path: str) -> int:
    if tokenizer.padding is not None:
        return tokenizer.padding["pad_id"]
    for name in ("[PAD]", "<pad>"):
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise ValueError(f"{path} names no padding: set tokenizer.pad_id to the id that fills a row")
