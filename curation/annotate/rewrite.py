"""Captions rewritten by a language model: LaCLIP, ParaCLIP, VeCLIP's fusion, or a prompt of yours.

Any causal model of `transformers`, by name or folder, GGUF files too. Text-only rewriting cannot
mend a wrong caption; it varies the words of a right one (LaCLIP: ImageNet zero-shot 15.8 -> 21.5 on
CC3M, 40.2 -> 48.4 on CC12M, when mixed with the originals).
Price: a forward over the prompt and one for each token of the answer; a guidance other than 0 and 1
doubles it. `python -m curation.run plan` measures a sample first. Through a server: served.py.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curation.annotate.answers import bank_rows, check_prompts
from curation.annotate.bank import Bank, bank_columns
from curation.annotate.gates import Gates
from curation.annotate.language_models import (
    Decoding,
    device_of,
    dtype_of,
    generate,
    model_files,
    model_name,
)
from curation.annotate.prompts import Answer, Prompt, Question


class Rewrite:
    """model: a folder or a name; revision: of a name, give a commit. gguf_file: in the folder.

    prompts: by name, see prompts.py. gates: None for the defaults. chat: wrap questions in the
    model's chat template, if it has one. guidance: of the caption against a prompt without one.
    Columns: captions_<bank>, <bank>_refused. max_prompt_tokens: longer prompts are refused
    (prompt_too_long), not cut.
    Sampled answers are a function of (seed, uid); padding in a batch may change a logit's last bit.
    """

    version = 1
    needs_images, reads = False, ("caption",)
    rows_per_unit = 64
    operational = ("batch_size", "device", "threads")

    def __init__(
        self,
        *,
        model: str,
        prompts: Mapping[str, Prompt],
        bank: str = "rewrite",
        gates: Gates | None = None,
        revision: str | None = None,
        gguf_file: str | None = None,
        chat: bool = True,
        batch_size: int = 16,
        max_prompt_tokens: int = 2048,
        max_new_tokens: int = 77,
        temperature: float = 0.9,
        top_p: float = 0.95,
        guidance: float = 1.0,
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        threads: int = 1,
    ):
        check_prompts(prompts)
        if batch_size < 1 or threads < 1:
            raise ValueError(f"batch_size={batch_size}, threads={threads}: both at least 1")
        self.name, self.model, self.revision = f"rewrite_{bank}", model, revision
        self.prompts, self.bank, self.gates = dict(prompts), bank, gates or Gates()
        self.gguf_file, self.chat, self.batch_size = gguf_file, chat, batch_size
        self.rows_per_save = batch_size
        self.max_prompt_tokens, self.threads = max_prompt_tokens, threads
        self.decoding = Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            guidance=guidance,
            seed=seed,
        )
        self.dtype, self.device = dtype_of(dtype), device
        self.inputs = model_files(model, gguf_file)
        self.columns: dict[str, pa.DataType] = bank_columns(bank)
        self._loaded: tuple[Any, Any, Bank] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}  # each worker loads its own

    def load(self) -> tuple[Any, Any, Bank]:
        """Model, tokenizer and bank, once. Raises ValueError when the model cannot be loaded."""
        if self._loaded is None:
            torch.set_num_threads(self.threads)
            extra = {"revision": self.revision} if self.revision else {}
            if self.gguf_file:
                extra["gguf_file"] = self.gguf_file
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model, **extra)
                model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, **extra)
            except (OSError, ImportError) as error:
                raise ValueError(f"model={self.model} cannot be loaded: {error}") from error
            tokenizer.padding_side = "left"  # answers begin where the prompts end
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            model = model.to(device_of(self.device)).eval()
            bank = Bank(
                name=self.bank,
                source="rewrite",
                model=model_name(self.model, self.revision, self.inputs),
                sampling=self.decoding.settings(),
            )
            self._loaded = model, tokenizer, bank
        return self._loaded

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The bank's columns of each sample."""
        bank = self.load()[2]
        return bank_rows(bank, self.prompts, self.gates, batch, self.ask, images=False)

    def ask(self, questions: list[Question]) -> list[Answer]:
        """Answers in the questions' order; batches hold prompts of like length."""
        _, tokenizer, _ = self.load()
        spelled = [self.spell(q.text, q.system) for q in questions]
        lengths = [len(ids) for ids in tokenizer(spelled, add_special_tokens=False)["input_ids"]]
        answers = [Answer(None, reason="prompt_too_long")] * len(questions)
        fitting = [n for n, length in enumerate(lengths) if length <= self.max_prompt_tokens]
        fitting.sort(key=lambda n: (lengths[n], n))
        for start in range(0, len(fitting), self.batch_size):
            rows = fitting[start : start + self.batch_size]
            found = self.answer([questions[n] for n in rows])
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    def spell(self, text: str, system: str | None) -> str:
        """A question as the model reads it."""
        _, tokenizer, _ = self.load()
        if not (self.chat and tokenizer.chat_template):
            return f"{system}\n\n{text}" if system else text
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def answer(self, questions: list[Question]) -> list[Answer]:
        """One batch."""
        model, tokenizer, _ = self.load()
        seen = [self.spell(q.text, q.system) for q in questions]
        blind = [self.spell(q.blind, q.system) for q in questions]
        texts = seen + blind if self.decoding.doubled else seen
        texts = blind if self.decoding.guidance == 0 else texts
        templated = bool(self.chat and tokenizer.chat_template)  # it spells its own BOS
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not templated
        )
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        keys = [(q.uid, q.draw) for q in questions]
        tokens, scores = generate(model, inputs, self.decoding, keys, name=self.name)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text, score) for text, score in zip(texts, scores, strict=True)]
