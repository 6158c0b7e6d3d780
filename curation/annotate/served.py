"""Captions and rewrites from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp ...

That is how people run this at scale: one server a GPU with continuous batching, many requests at a
time. The prompts are those of caption.py and rewrite.py.
Price: the server's; here a thread a request. Guidance is not part of the protocol: use caption.py.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from curation.annotate.answers import bank_rows, check_prompts
from curation.annotate.bank import Bank, bank_columns
from curation.annotate.chat_server import ChatServer, NoAnswer, chat_messages
from curation.annotate.gates import Gates
from curation.annotate.prompts import Answer, Prompt, Question
from pipeline.data.images import BadImage
from pipeline.models.decoding import check_sampling


class Served:
    """server: see chat_server.py. model: the server's name of it, kept with each caption: name a
    new revision anew.

    prompts: by name, see prompts.py. images: whether the image goes along. extra: more fields of
    the request's body (guided_json, chat_template_kwargs ...), part of `sampling`. concurrency:
    requests under way at a time. seed: sent along, plus a number for each copy.
    A request without an answer is a counted reason: timeout, bad_answer, http_400 ... More than
    `max_failed_fraction` of a batch, or nobody at the address, stops the run; what is finished is
    kept, and the same command goes on.
    Columns: captions_<bank>, <bank>_refused.
    """

    version = 1
    reads = ("caption",)
    rows_per_unit = 64
    operational = (
        "server.url",
        "server.key_variable",
        "server.timeout_seconds",
        "server.attempts",
        "server.backoff_seconds",
        "concurrency",
        "max_failed_fraction",
    )

    def __init__(
        self,
        *,
        server: ChatServer,
        model: str,
        prompts: Mapping[str, Prompt],
        images: bool,
        bank: str = "served",
        gates: Gates | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 16,
        max_failed_fraction: float = 0.25,
    ):
        check_prompts(prompts)
        check_sampling(temperature=temperature, top_p=top_p, guidance=1)
        if max_tokens < 1 or concurrency < 1 or not 0 <= max_failed_fraction <= 1:
            raise ValueError(
                f"max_tokens={max_tokens}, concurrency={concurrency}: at least 1; "
                f"max_failed_fraction={max_failed_fraction}: a fraction in [0, 1]"
            )
        self.name, self.server, self.needs_images = f"served_{bank}", server, images
        self.prompts, self.gates, self.seed = dict(prompts), gates or Gates(), seed
        self.concurrency, self.max_failed_fraction = concurrency, max_failed_fraction
        self.rows_per_save = concurrency
        self.body = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            **(extra or {}),
        }
        sampling = {key: value for key, value in self.body.items() if key != "model"}
        self.bank = Bank(
            name=bank, source="served", model=model, sampling={**sampling, "seed": seed}
        )
        self.inputs: dict[str, str] = {}
        self.columns: dict[str, pa.DataType] = bank_columns(bank)

    def annotate(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The bank's columns of each sample."""
        return bank_rows(
            self.bank, self.prompts, self.gates, batch, self.ask, images=self.needs_images
        )

    def ask(self, questions: list[Question]) -> list[Answer]:
        """Answers in the questions' order. Raises ValueError when too many fail."""
        with ThreadPoolExecutor(self.concurrency) as threads:
            try:
                answers = list(threads.map(self.answer, questions))
            except NoAnswer as error:
                threads.shutdown(cancel_futures=True)
                raise ValueError(
                    f"the server at {self.server.url} does not answer after "
                    f"{self.server.attempts} attempts ({error}): start it, or give another "
                    "server.url; the same command goes on where this one stopped"
                ) from error
        reasons = [answer.reason for answer in answers if answer.reason]
        failed = [reason for reason in reasons if not reason.startswith("image_")]
        if len(failed) > self.max_failed_fraction * len(questions):
            raise ValueError(
                f"{len(failed)} of {len(questions)} requests to {self.server.url} failed "
                f"({', '.join(sorted(set(failed)))}): over max_failed_fraction="
                f"{self.max_failed_fraction}; slow: lower concurrency or raise "
                "server.timeout_seconds"
            )
        return answers

    def answer(self, question: Question) -> Answer:
        """One request. Raises NoAnswer when nobody is there."""
        try:
            messages = chat_messages(question.text, question.system, question.image)
            body = {**self.body, "messages": messages, "seed": self.seed + question.draw}
            return Answer(self.server.complete(body))
        except BadImage as error:
            return Answer(None, reason=f"image_{error.reason}")
        except NoAnswer as error:
            if error.down:
                raise
            return Answer(None, reason=error.reason)
