"""What a model is asked, and how its answer becomes captions.

A prompt is a template with places: {caption} the pool's text, {answer} the answer of the step
before. One prompt may ask in several steps (ParaCLIP), for several captions at once as JSON
(HQ-CLIP), or show examples first (LaCLIP). All randomness is counter-based: the same pair gets the
same examples in any batch.
"""

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from curation.annotate.bank import text_hash
from curation.step import uniform
from pipeline.shards import ROLES

PLACES = ("caption", "answer")


class Answer(NamedTuple):
    """What came back for one question. text None: nothing, for `reason`. score: mean
    log-probability of the tokens, where the model tells it.
    """

    text: str | None
    score: float | None = None
    reason: str | None = None


class Question(NamedTuple):
    """One question to a model. draw: names its randomness together with the uid."""

    uid: str
    text: str
    system: str | None = None
    image: bytes | None = None
    draw: int = 0
    blind: str = ""  # the same question without the caption, for guidance of text models


class Draft(NamedTuple):
    """A caption before the gates. reason: why there is none."""

    role: str
    text: str | None
    score: float | None
    reason: str | None
    prompt: str  # hash of the prompt
    asked: str  # what the model read: a copied piece of it is no caption


class Prompt(Protocol):
    """steps: how many questions follow each other. copies: captions asked for of each pair.

    role: of the caption, the first of several. needs_caption: whether it holds the pool's text.
    """

    steps: int
    copies: int
    role: str
    system: str | None
    needs_caption: bool

    def question(self, step: int, uid: str, copy: int, caption: str, answer: str) -> str: ...

    def drafts(self, answer: str) -> list[tuple[str, str | None, str | None]]:
        """(role, text, reason) of each caption in the last answer."""
        ...

    def identity(self) -> str:
        """What the prompt's hash is of."""
        ...


class Ask:
    """steps: templates, asked one after the other; a single string is one step.

    role: of the caption that comes out. system: the system message, if any. copies: answers drawn
    for each pair; needs temperature > 0 to differ.
    answer: "text", the whole answer is the caption; "json", an object whose `fields` (key -> role)
    are captions: strings, or lists that are joined by ", ".
    Raises ValueError for an unknown place, role or answer.
    """

    def __init__(
        self,
        *,
        steps: Sequence[str] | str,
        role: str = "rewrite",
        system: str | None = None,
        copies: int = 1,
        answer: Literal["text", "json"] = "text",
        fields: Mapping[str, str] | None = None,
    ):
        self.templates = (steps,) if isinstance(steps, str) else tuple(steps)
        self.steps, self.copies, self.system = len(self.templates), copies, system
        self.answer, self.fields = answer, dict(fields or {})
        self.role = next(iter(self.fields.values()), role)
        if not self.templates or copies < 1:
            raise ValueError(f"steps: {len(self.templates)} templates, copies {copies}: 1 or more")
        for template in self.templates:
            check_places(template)
        self.needs_caption = any("caption" in found_places(t) for t in self.templates)
        unknown = [r for r in (role, *self.fields.values()) if r not in ROLES]
        if unknown:
            raise ValueError(f"role {unknown}: roles are {', '.join(ROLES)}")
        if answer not in ("text", "json") or (answer == "json") != bool(self.fields):
            raise ValueError(f"answer {answer!r}: text, or json together with fields {{key: role}}")

    def question(self, step: int, uid: str, copy: int, caption: str, answer: str) -> str:
        """A template with its places filled; braces in a caption mean nothing."""
        return fill(self.templates[step], caption=caption, answer=answer)

    def drafts(self, answer: str) -> list[tuple[str, str | None, str | None]]:
        """The caption, or one for each field. not_json: no object in the answer; no_field: a key
        is missing.
        """
        if self.answer == "text":
            return [(self.role, cleaned(answer), None)]
        found = json_object(answer)
        if found is None:
            return [(role, answer if n == 0 else None, "not_json")
                    for n, role in enumerate(self.fields.values())]  # fmt: skip
        drafts = []
        for key, role in self.fields.items():
            value = found.get(key)
            if isinstance(value, list):
                value = ", ".join(str(item) for item in value)
            text = cleaned(value) if isinstance(value, str) else None
            drafts.append((role, text, None if text is not None else "no_field"))
        return drafts

    def identity(self) -> str:
        return json.dumps([self.templates, self.system, self.fields], ensure_ascii=False)


class InContext:
    """LaCLIP's in-context rewriting (arXiv:2305.20088, sec. 3.1): a model that only continues text
    is shown pairs "source => target" and goes on after "caption =>".

    examples: [[source, target], ...]; `shots` of them, drawn without replacement for each pair and
    copy. The paper: 3 of 16, copies 4, temperature 0.9, top_p 0.95, 77 tokens. Layout and 12 spaces
    of indentation are its; the examples are yours.
    """

    steps, system, needs_caption = 1, None, True

    def __init__(
        self,
        *,
        examples: Sequence[Sequence[str]],
        shots: int = 3,
        copies: int = 4,
        instruction: str = "write image captions differently,",
        indent: int = 12,
        role: str = "rewrite",
        seed: int = 0,
    ):
        if any(len(pair) != 2 for pair in examples) or not 1 <= shots <= len(examples):
            raise ValueError(
                f"examples: {len(examples)} given, shots {shots}: give [source, target] pairs, at "
                "least as many as shots"
            )
        if role not in ROLES or copies < 1:
            raise ValueError(f"role {role!r}, copies {copies}: roles are {', '.join(ROLES)}")
        self.examples = [tuple(pair) for pair in examples]
        self.shots, self.copies, self.role, self.seed = shots, copies, role, seed
        self.instruction, self.indent = instruction, " " * indent

    def question(self, step: int, uid: str, copy: int, caption: str, answer: str) -> str:
        """The instruction, the examples that (seed, uid, copy) draws, and the caption."""
        count = len(self.examples)
        salts = range(copy * count, (copy + 1) * count)
        draws = uniform(self.seed, "in-context examples", [uid] * count, salts)
        chosen = np.argsort(draws, kind="stable")[: self.shots]
        return self.prompt([int(n) for n in chosen], caption)

    def prompt(self, chosen: Sequence[int], caption: str) -> str:
        """The prompt with these examples."""
        pairs = [" => ".join(self.examples[n]) for n in chosen]
        lines = [*pairs, caption.replace("\n", "") + " =>"]
        return self.instruction + "".join(f"\n\n{self.indent}{line}" for line in lines)

    def drafts(self, answer: str) -> list[tuple[str, str | None, str | None]]:
        """What stands before the next line or the next "=>"; an answer that repeats the prompt's
        "caption =>" is taken behind it.
        """
        line = next((line for line in answer.split("\n") if line.strip()), "")
        parts = [part.strip() for part in line.split("=>")]
        text = next((part for part in parts if part), "")
        return [(self.role, cleaned(text), None)]

    def identity(self) -> str:
        parts = [self.instruction, self.indent, self.shots, self.seed, self.examples]
        return json.dumps(parts, ensure_ascii=False)


def ask_all(
    prompts: Mapping[str, Prompt],
    samples: Sequence[Mapping[str, Any]],
    ask: Callable[[list[Question]], list[Answer]],
    *,
    images: bool,
) -> list[list[Draft]]:
    """Every prompt of every sample, `copies` times, step after step; drafts by sample.

    `ask` gets all questions of a step at once. A sample without a caption (None) is not asked when
    the prompt needs one: reason no_caption.
    """
    drafts: list[list[Draft]] = [[] for _ in samples]
    for number, prompt in enumerate(prompts.values()):
        mark = text_hash(prompt.identity())
        jobs = [(row, copy) for row in range(len(samples)) for copy in range(prompt.copies)]
        answers = [Answer("")] * len(jobs)
        asked = [""] * len(jobs)
        for step in range(prompt.steps):
            questions, where = [], []
            for job, (row, copy) in enumerate(jobs):
                sample, before = samples[row], answers[job].text
                if before is None:
                    continue
                if prompt.needs_caption and not (sample.get("caption") or "").strip():
                    answers[job] = Answer(None, reason="no_caption")
                    continue
                uid, caption = sample["uid"], sample.get("caption") or ""
                asked[job] = prompt.question(step, uid, copy, caption, before)
                blind = prompt.question(step, uid, copy, "", "")
                draw = (number * 1000 + copy) * 100 + step
                image = sample["image"] if images else None
                questions.append(Question(uid, asked[job], prompt.system, image, draw, blind))
                where.append(job)
            found = ask(questions) if questions else []
            for job, answer in zip(where, found, strict=True):
                answers[job] = answer
        for (row, _), answer, text in zip(jobs, answers, asked, strict=True):
            if answer.text is None:
                reason = answer.reason or "no_answer"
                drafts[row].append(Draft(prompt.role, None, None, reason, mark, text))
                continue
            for role, caption, reason in prompt.drafts(answer.text):
                drafts[row].append(Draft(role, caption, answer.score, reason, mark, text))
    return drafts


def found_places(template: str) -> set[str]:
    """Names in braces; doubled braces are braces. Raises ValueError for a lone brace."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ for a brace") from error


def check_places(template: str) -> None:
    """Raises ValueError for a place that nobody fills."""
    unknown = found_places(template) - set(PLACES)
    if unknown:
        known = ", ".join(f"{{{place}}}" for place in PLACES)
        raise ValueError(f"template {template!r}: unknown {sorted(unknown)}; there are {known}")


def fill(template: str, **values: str) -> str:
    """The template with its places filled, once: braces in a value stay as they are."""
    return template.format(**values)


def cleaned(text: str) -> str:
    """One line, without a label ("Caption:"), a list mark or the quotes a model puts around it."""
    text = " ".join(text.split())
    text = re.sub(r"^(?:(?:caption|answer|rewritten caption)\s*:|[-*•]|\d+[.)])\s+", "", text,
                  flags=re.IGNORECASE)  # fmt: skip
    for quotes in ('""', "''", "“”", "«»"):
        inner = text[1:-1]
        if len(text) > 1 and text[0] == quotes[0] and text[-1] == quotes[1]:
            return inner.strip() if quotes[0] not in inner else text
    return text


def json_object(answer: str) -> dict[str, Any] | None:
    """The first JSON object in an answer, whatever stands around it; None if there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", answer):
        try:
            found, _ = decoder.raw_decode(answer, match.start())
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None
