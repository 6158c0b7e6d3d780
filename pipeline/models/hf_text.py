"""Any text model of Hugging Face transformers as a text tower.

Letters: B captions, L positions, W width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from pipeline.models.text import mean_of, not_padding

POOLINGS = ("mean", "first", "eot")


class HfText(nn.Module):
    """(B, L) token ids -> text features (B, W), the model's last hidden states pooled.

    path: a directory with weights and config.json, or a model's name where the hub can be reached.
    config: the config's values, `model_type` among them, for a model with random weights. One of
    the two.
    pooling: "first" (BERT's [CLS]), "mean" over all tokens but padding, or "eot", the last token
    before padding.
    pad_id: a row's closing run of this id is padding; None for the config's own. Give the tokenizer
    the same one.
    Of an encoder-decoder (T5) the encoder is taken; a pooling head of the model's own is removed:
    it would be parameters without gradient.
    Attributes: width, context_length, vocab_size.
    Raises ValueError for a missing path, a model that reads fewer positions than context_length,
    and an unknown pooling.
    """

    def __init__(
        self,
        *,
        context_length: int,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        pooling: str = "mean",
        pad_id: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (path is None) == (config is None):
            raise ValueError(
                "a text model comes from `path` (with weights) or from `config` (random): "
                "give one of them"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}: one of {sorted(POOLINGS)}")
        model = _pretrained(path) if path is not None else _random(config)
        settings = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        if activation_checkpointing:
            # Renamed in transformers 5; the old name goes with version 6, and this then too.
            old = "gradient_checkpointing_enable"
            enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
            enable({"use_reentrant": False})
        self.model = model
        self.pooling = pooling
        self.width = settings.hidden_size
        self.vocab_size = settings.vocab_size
        self.context_length = context_length
        self.pad_id = _pad_id(settings) if pad_id is None else pad_id
        # RoBERTa counts its positions from pad_id + 1
        limit = getattr(settings, "max_position_embeddings", None)
        if limit is not None and "roberta" in settings.model_type:
            limit -= self.pad_id + 1
        if limit is not None and context_length > limit:
            raise ValueError(
                f"context_length {context_length} is more than the {limit} positions of "
                f"{path or settings.model_type}: set it to {limit} or fewer"
            )

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """tokens: (B, L) int64, padded with pad_id.

        Raises ValueError for `kept`: such a model numbers positions itself; text policies that
        shorten captions (`reduce`) work with it.
        """
        if kept is not None:
            raise ValueError(
                "a Hugging Face text tower numbers its own positions and cannot take kept ones: "
                "use a text_tokens policy that shortens the caption"
            )
        if tokens.shape[1] > self.context_length:
            raise ValueError(
                f"captions have {tokens.shape[1]} positions, the tower was built with "
                f"context_length={self.context_length}: give the tokenizer the same context_length"
            )
        words = not_padding(tokens, self.pad_id)
        out = self.model(input_ids=tokens, attention_mask=words.to(torch.int64))
        x = out.last_hidden_state
        if self.pooling == "first":
            return x[:, 0]
        if self.pooling == "mean":
            return mean_of(x, words)
        row = torch.arange(len(x), device=x.device)
        return x[row, words.sum(dim=1).sub(1).clamp(min=0)]


def _pretrained(path: str) -> nn.Module:
    try:
        return AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        what = "has no model" if Path(path).exists() else "is no directory"
        raise ValueError(
            f"text.path={path} {what} and no model of that name could be had: give a directory "
            f"with config.json and weights, or `config` for random ones ({error})"
        ) from error


def _random(config: Mapping[str, Any]) -> nn.Module:
    values = dict(config)
    if "model_type" not in values:
        raise ValueError("text.config needs `model_type`, such as bert, roberta or xlm-roberta")
    return AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def _pad_id(settings: Any) -> int:
    if settings.pad_token_id is None:
        raise ValueError(
            f"the config of this {settings.model_type} names no pad_token_id: give pad_id, the id "
            "the tokenizer pads with"
        )
    return settings.pad_token_id
