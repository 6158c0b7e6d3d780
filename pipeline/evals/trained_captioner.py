"""A run directory of pipeline.train_captioner -> a model that writes captions of image bytes."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pipeline.config import build
from pipeline.data.tokenizer import WORD_END, BpeTokenizer, byte_alphabet
from pipeline.evals.trained import Transform, newest_checkpoint, read_weights
from pipeline.models.captioner import Captioner
from pipeline.targets import read_config

PARTS = ("image", "decoder", "tokenizer", "transform")


class TrainedCaptioner:
    """A captioner in evaluation mode with the tokenizer and the transform it was trained with."""

    def __init__(
        self,
        *,
        model: Captioner,
        tokenizer: BpeTokenizer,
        transform: Transform,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model.to(device).eval()
        self.tokenizer, self.transform, self.device = tokenizer, transform, torch.device(device)
        self.spell = speller(tokenizer)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        allow_foreign_targets: bool = False,
    ) -> "TrainedCaptioner":
        """checkpoint: None for the newest. device: None for the GPU if there is one.
        allow_foreign_targets: whether its config may name classes that are not ours.

        Raises ValueError if the run, its checkpoint or a weight is missing.
        """
        config = captioner_config(run, allow_foreign_targets=allow_foreign_targets)
        path = Path(checkpoint) if checkpoint is not None else newest_checkpoint(run)
        tokenizer = build(config.tokenizer)
        model = make_captioner(config, tokenizer)
        try:
            model.load_state_dict(read_weights(path))
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit {run}/config.yaml: {error}") from error
        return cls(
            model=model,
            tokenizer=tokenizer,
            transform=build(config.transform),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def pixels(self, images: Sequence[bytes]) -> Tensor:
        """(n, 3, S, S) normalised, on the device. Raises ValueError for bytes that are no image."""
        stacked = torch.stack([self.transform.evaluate(image) for image in images])
        return self.transform.normalise(stacked.to(self.device))

    def caption(
        self,
        pixels: Tensor,
        *,
        uniforms: Tensor | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        guidance: float = 1.0,
    ) -> tuple[list[str], list[float]]:
        """Texts and scores of a batch; see Captioner.generate."""
        tokens, scores = self.model.generate(
            pixels,
            uniforms=None if uniforms is None else uniforms.to(self.device),
            temperature=temperature,
            top_p=top_p,
            guidance=guidance,
        )
        return [self.spell(row) for row in tokens.tolist()], scores.tolist()


def captioner_config(run: str | Path, *, allow_foreign_targets: bool = False) -> DictConfig:
    """The resolved config that pipeline.train_captioner left in the run directory."""
    path = Path(run) / "config.yaml"
    config = OmegaConf.create()
    if path.is_file():
        config = read_config(path, allow_foreign_targets=allow_foreign_targets)
    if any(config.get(part) is None for part in PARTS):
        raise ValueError(
            f"{run} is no run of a captioner: train one with `python -m pipeline.train_captioner "
            "data.shards=DIR run=PROXY_RUN name=N` and give run=runs/N"
        )
    return config


def make_captioner(config: DictConfig, tokenizer: Any) -> Captioner:
    """The untrained model of a config whose image, tokenizer and transform are filled in."""
    decoder = build(config.decoder)(
        vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length
    )
    return Captioner(image=build(config.image), decoder=decoder, train_image=config.train_image)


def speller(tokenizer: BpeTokenizer) -> Callable[[Sequence[int]], str]:
    """Token ids, SOT ... EOT and anything -> text. Bytes that are no UTF-8 become U+FFFD."""
    tokens = {number: token for token, number in tokenizer._vocab.items()}
    byte = {symbol: number for number, symbol in _bytes_by_symbol()}

    def spell(ids: Sequence[int]) -> str:
        ids = list(ids)
        end = ids.index(tokenizer.eot) if tokenizer.eot in ids else len(ids)
        text = "".join(tokens[i] for i in ids[:end] if i != tokenizer.sot)
        words = text.replace(WORD_END, " ").split()
        text = " ".join(
            bytes(byte[symbol] for symbol in word).decode(errors="replace") for word in words
        )
        # the tokenizer forgets where spaces were; this is how they mostly stand
        return re.sub(r" ([,.:;!?)])", r"\1", text).replace("( ", "(")

    return spell


def _bytes_by_symbol() -> list[tuple[int, str]]:
    """CLIP's byte alphabet: a visible Latin-1 character is its own byte, the others come after."""
    alphabet = byte_alphabet()
    visible = [ord(symbol) for symbol in alphabet if ord(symbol) < 256]
    hidden = [number for number in range(256) if number not in set(visible)]
    return list(zip([*visible, *hidden], alphabet, strict=True))
