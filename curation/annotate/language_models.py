"""Models of `transformers`: which files they are, and how they are decoded.

Decoding is ours: a logits processor that combines the conditional and the unconditional half of a
doubled batch (classifier-free guidance) and draws tokens by counters of (seed, uid). So one code
path serves every causal and image-to-text model, and what is drawn does not depend on the batch.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from curation.annotate.bank import text_hash
from curation.pool import file_digest
from curation.step import uniform
from pipeline.models.decoding import check_sampling, choose, guided

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def model_files(model: str, gguf_file: str | None = None) -> dict[str, str]:
    """`inputs` of an annotator: what a local model's answers depend on; {} for a name on a hub,
    where name and revision say it.

    Raises ValueError for a folder without weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {}
    files = [folder / gguf_file] if gguf_file else sorted(folder.glob("*.json"))
    if not gguf_file:
        files += sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    if not any(path.suffix in WEIGHTS and path.is_file() for path in files):
        raise ValueError(f"{folder}: no weights ({', '.join(WEIGHTS)}); set model, or gguf_file")
    # the folder itself may move: the first file stands for the argument `model`
    named = {f"model/{path.name}": str(path) for path in files}
    return {"model": str(files[0]), **named}


def model_name(model: str, revision: str | None, files: dict[str, str]) -> str:
    """What a caption remembers of its model: a hash of a local one's files, else name@revision."""
    if files:
        return text_hash("".join(file_digest(files[name]) for name in sorted(files)))
    return f"{model}@{revision or 'main'}"


class Decoding:
    """temperature 0 is greedy; guidance: see pipeline/models/decoding.py; seed: of the draws."""

    def __init__(
        self, *, max_new_tokens: int, temperature: float, top_p: float, guidance: float, seed: int
    ):
        check_sampling(temperature=temperature, top_p=top_p, guidance=guidance)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: at least 1")
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.guidance, self.seed = guidance, seed

    @property
    def doubled(self) -> bool:
        """Whether each question is asked with and without what guidance is about."""
        return self.guidance not in (0, 1)

    def settings(self) -> dict[str, Any]:
        """What a caption remembers."""
        return dict(self.__dict__)


class Chooser(LogitsProcessor):
    """Chooses the next token of each row itself: `generate` sees one token that is possible.

    keys: (uid, draw) of each question; rows of a batch are the questions, and with guidance other
    than 0 and 1 once more the same questions without the image (or the caption).
    scores: mean log-probability of each answer's tokens, its end included.
    """

    def __init__(
        self, decoding: Decoding, keys: Sequence[tuple[str, int]], ends: Sequence[int], name: str
    ):
        self.decoding, self.ends, self.name = decoding, torch.tensor(list(ends)), name
        self.uids = [uid for uid, _ in keys]
        self.draws = [draw for _, draw in keys]
        self.place = 0
        self.total = torch.zeros(len(keys))
        self.length = torch.zeros(len(keys))
        self.ended = torch.zeros(len(keys), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits, rows = scores.float(), len(self.uids)
        log_probs = guided(logits[:rows], logits[-rows:], self.decoding.guidance)
        salt = [draw * 1_000_000 + self.place for draw in self.draws]
        uniforms = torch.from_numpy(uniform(self.decoding.seed, self.name, self.uids, salt))
        chosen = choose(
            log_probs,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            uniforms=uniforms.to(log_probs.device),
        )
        gained = log_probs.gather(1, chosen[:, None]).squeeze(1).cpu()
        self.total += gained.masked_fill(self.ended, 0.0)
        self.length += (~self.ended).float()
        self.ended |= torch.isin(chosen.cpu(), self.ends)
        self.place += 1
        only = torch.full_like(scores[:rows], -torch.inf).scatter_(1, chosen[:, None], 0.0)
        return only.repeat(len(scores) // rows, 1)

    @property
    def scores(self) -> list[float]:
        return (self.total / self.length.clamp(min=1)).tolist()


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    decoding: Decoding,
    keys: Sequence[tuple[str, int]],
    *,
    name: str,
) -> tuple[Tensor, list[float]]:
    """Token ids of the answers (B, L'), without the prompt, and their scores.

    inputs: of B questions, or of 2 B where `decoding.doubled`: first with, then without what
    guidance is about.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        num_beams=1,
        max_new_tokens=decoding.max_new_tokens,
        max_length=None,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if ends else 0
    chooser = Chooser(decoding, keys, ends, name)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList([chooser])
        )
    if "input_ids" in inputs and not model.config.is_encoder_decoder:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return tokens[: len(keys)].cpu(), chooser.scores


def device_of(device: str | None) -> str:
    """The device asked for, else the GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(dtype: str) -> Any:
    """Raises ValueError for an unknown name."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
