"""From a model's drafts to a bank's rows: the last step that all captioning annotators share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from curation.annotate.bank import Bank, Candidate
from curation.annotate.gates import Gates
from curation.annotate.prompts import Answer, Prompt, Question, ask_all


def bank_rows(
    bank: Bank,
    prompts: Mapping[str, Prompt],
    gates: Gates,
    samples: Sequence[Mapping[str, Any]],
    ask: Callable[[list[Question]], list[Answer]],
    *,
    images: bool,
) -> list[dict[str, Any]]:
    """Ask every prompt of every sample, judge the answers, and fill the bank's columns."""
    rows = []
    drafts = ask_all(prompts, samples, ask, images=images)
    for sample, mine in zip(samples, drafts, strict=True):
        original, candidates = sample.get("caption") or "", []
        for draft in mine:
            reason = draft.reason or gates.reason(draft.text, asked=draft.asked, original=original)
            candidates.append(Candidate(draft.role, draft.text, draft.score, reason, draft.prompt))
        rows.append(bank.row(candidates))
    return rows


def check_prompts(prompts: Mapping[str, Prompt]) -> None:
    """Raises ValueError when there is nothing to ask."""
    if not prompts:
        raise ValueError("prompts is empty: give at least one, as in conf/annotate/caption.yaml")
