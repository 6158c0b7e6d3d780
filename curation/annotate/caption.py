"""Captions by a vision-language model: Recap-DataComp-1B's recipe, HQ-CLIP's four texts, or yours.

Any `AutoModelForImageTextToText` of `transformers`, by name or folder. A prompt may hold the pool's
own text ({caption}), so that the model sees both (HQ-CLIP, Altogether).
Price: a forward over image and prompt and one for each token of the answer (Recap: 49 words an
image); a guidance other than 0 and 1 doubles it. Mix such captions with the originals, never
replace them: docs/curation/recaptioning.md. Through a server: served.py.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

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
from pipeline.data.images import BadImage, decode

GREY = (128, 128, 128)


class Caption:
    """model: a folder or a name; revision: of a name, give a commit.

    prompts: by name, see prompts.py; an empty template asks a model that takes no text. gates: None
    for the defaults. guidance: of the image against a grey one of its size, for models that were
    not trained to miss the image (arXiv:2307.16686 trains for it). Columns: captions_<bank>,
    <bank>_refused; an image that cannot be decoded is refused by its reason.
    """

    version = 1
    needs_images, reads = True, ("caption",)
    rows_per_unit = 64
    operational = ("batch_size", "device", "threads")

    def __init__(
        self,
        *,
        model: str,
        prompts: Mapping[str, Prompt],
        bank: str = "caption",
        gates: Gates | None = None,
        revision: str | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        guidance: float = 1.0,
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        threads: int = 1,
    ):
        check_prompts(prompts)
        if batch_size < 1 or threads < 1:
            raise ValueError(f"batch_size={batch_size}, threads={threads}: both at least 1")
        self.name, self.model, self.revision = f"caption_{bank}", model, revision
        self.prompts, self.bank, self.gates = dict(prompts), bank, gates or Gates()
        self.batch_size, self.threads = batch_size, threads
        self.rows_per_save = batch_size
        self.decoding = Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            guidance=guidance,
            seed=seed,
        )
        self.dtype, self.device = dtype_of(dtype), device
        self.inputs = model_files(model)
        self.columns: dict[str, pa.DataType] = bank_columns(bank)
        self._loaded: tuple[Any, Any, Bank] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}  # each worker loads its own

    def load(self) -> tuple[Any, Any, Bank]:
        """Model, processor and bank, once. Raises ValueError when the model cannot be loaded."""
        if self._loaded is None:
            torch.set_num_threads(self.threads)
            extra = {"revision": self.revision} if self.revision else {}
            try:
                processor = AutoProcessor.from_pretrained(self.model, **extra)
                model = AutoModelForImageTextToText.from_pretrained(
                    self.model, dtype=self.dtype, **extra
                )
            except (OSError, ImportError) as error:
                raise ValueError(f"model={self.model} cannot be loaded: {error}") from error
            processor.tokenizer.padding_side = "left"  # answers begin where the prompts end
            if processor.tokenizer.pad_token is None:
                processor.tokenizer.pad_token = processor.tokenizer.eos_token
            model = model.to(device_of(self.device)).eval()
            bank = Bank(
                name=self.bank,
                source="caption",
                model=model_name(self.model, self.revision, self.inputs),
                sampling=self.decoding.settings(),
            )
            self._loaded = model, processor, bank
        return self._loaded

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The bank's columns of each sample."""
        bank = self.load()[2]
        return bank_rows(bank, self.prompts, self.gates, batch, self.ask, images=True)

    def ask(self, questions: list[Question]) -> list[Answer]:
        """Answers in the questions' order."""
        answers: list[Answer] = []
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            images = [decoded(question.image) for question in batch]
            good = [n for n, image in enumerate(images) if not isinstance(image, str)]
            found = [Answer(None, reason=str(image)) for image in images]
            if good:
                done = self.answer([batch[n] for n in good], [images[n] for n in good])
                for n, answer in zip(good, done, strict=True):
                    found[n] = answer
            answers += found
        return answers

    def spell(self, question: Question) -> str:
        """A question as the model reads it, with the place of the image."""
        _, processor, _ = self.load()
        if not processor.chat_template:
            return question.text
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        if question.system:
            system = [{"type": "text", "text": question.system}]
            messages.insert(0, {"role": "system", "content": system})
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def answer(self, questions: list[Question], images: list[Image.Image]) -> list[Answer]:
        """One batch of decoded images."""
        model, processor, _ = self.load()
        texts = [self.spell(question) for question in questions]
        blank = [Image.new("RGB", image.size, GREY) for image in images]
        if self.decoding.doubled:
            texts, images = texts * 2, images + blank
        elif self.decoding.guidance == 0:
            images = blank
        asked = {"text": texts, "padding": True} if any(texts) else {}
        # one list an image: models that take several images a question want to be told
        listed = [[image] for image in images] if processor.chat_template else images
        inputs = processor(images=listed, return_tensors="pt", **asked).to(model.device)
        inputs = {
            key: value.to(model.dtype) if value.is_floating_point() else value
            for key, value in inputs.items()
        }
        keys = [(question.uid, question.draw) for question in questions]
        tokens, scores = generate(model, inputs, self.decoding, keys, name=self.name)
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text, score) for text, score in zip(texts, scores, strict=True)]


def decoded(image: bytes | None) -> Image.Image | str:
    """The picture as RGB, or the reason why there is none."""
    try:
        return decode(image or b"")
    except BadImage as error:
        return f"image_{error.reason}"
