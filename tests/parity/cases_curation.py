"""Parity cases of curation: matching, balancing, covariance selection, near duplicates."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from case import Case, difference, unequal

from curation.annotate.entries import EntryMatcher, padded
from curation.select.balance import (
    inclusion_probability,
    keep_probability,
    language_threshold,
    tail_fraction,
)
from curation.select.covariance import select
from curation.select.duplicates import max_similarity, rank, removed


def metaclip_match(content: dict, arrays: dict) -> Iterator[Case]:
    def wrong_captions(part: dict, rule: str, key: str, strip: bool) -> float:
        matcher = EntryMatcher(entries=part["entries"], rule=rule)
        captions = [caption.strip() if strip else caption for caption in part["captions"]]
        found = matcher.match(captions)
        return float(sum(a != b for a, b in zip(found, part[key], strict=True)))

    def wrong_padding(part: dict, rule: str) -> float:
        found = [padded(entry, rule) for entry in part["entries"]]
        return unequal(found, part["padded_entries"])

    rules = {"v1": "metaclip", "v2": "metaclip2"}
    expected = {"expected_ids": False, "expected_ids_after_strip": True, "v1_rule_ids": False}
    for version, part in content.items():
        for key, strip in expected.items():
            rule = "metaclip" if key == "v1_rule_ids" else rules.get(version)
            if key in part:
                measure = partial(wrong_captions, part, rule, key, strip) if rule else None
                yield Case(f"{version}/{key}", measure)
        if "padded_entries" in part:
            yield Case(f"{version}/padded_entries", partial(wrong_padding, part, rules[version]))


def metaclip_balance(content: dict, arrays: dict) -> Iterator[Case]:
    yield from _sampling_cases(content, arrays)
    yield from _language_cases(content, arrays)


def _sampling_cases(content: dict, arrays: dict) -> Iterator[Case]:
    entry, text = arrays["index_entry"], arrays["index_text"]
    num_texts = len(arrays["text_uniforms"])
    rows = np.split(entry, np.searchsorted(text, np.arange(1, num_texts)))

    def probability(case: dict) -> np.ndarray:
        limit = np.inf if case["t"] == "inf" else case["t"]
        return keep_probability(counts=arrays[case["counts"]], max_pairs_per_entry=limit)

    def inclusion(case: dict) -> np.ndarray:
        p = probability(case)
        found = [inclusion_probability(entry_ids=ids, probability=p) for ids in rows]
        return np.where([len(ids) > 0 for ids in rows], found, np.nan)

    def row_draws(case: dict, expected: np.ndarray) -> float:
        return unequal(np.unique(text[arrays["uniforms"] < probability(case)[entry]]), expected)

    def one_draw(case: dict, expected: np.ndarray) -> float:
        kept = inclusion(case) >= arrays["text_uniforms"]  # false where there is no match
        return unequal(np.flatnonzero(kept), expected)

    for name, case in content["cases"].items():
        checks: dict[str, tuple[Callable[[np.ndarray], float], float]] = {
            "p": (lambda expected, case=case: unequal(probability(case), expected), 0.0),
            "noisy_or": (lambda expected, case=case: difference(inclusion(case), expected), 1e-15),
            # the reference's float32 products, against our float64 ones
            "noisy_or_f32": (
                lambda expected, case=case: difference(inclusion(case), expected),
                1e-6,
            ),
            "kept": (partial(row_draws, case), 0.0),
            "one_draw_kept": (partial(one_draw, case), 0.0),
        }
        for kind, (measure, tolerance) in checks.items():
            if f"{kind}_{name}" in arrays:
                expected = arrays[f"{kind}_{name}"]
                yield Case(f"{name}/{kind}", partial(measure, expected), tolerance)


def _language_cases(content: dict, arrays: dict) -> Iterator[Case]:
    def counts(language: str) -> np.ndarray:
        return arrays[f"lang_count_{language}"]

    def tail(language: str, limit: int, expected: float) -> float:
        return unequal(tail_fraction(counts=counts(language), max_pairs_per_entry=limit), expected)

    def threshold(language: str, fraction: float, expected: int) -> float:
        found = language_threshold(counts=counts(language), tail_fraction=fraction)
        return abs(found - max(1, expected))  # the reference's 0 drops the language: we clamp

    def probability(language: str, limit: int, expected: np.ndarray) -> float:
        p = keep_probability(counts=counts(language), max_pairs_per_entry=limit)
        return unequal(p.astype(np.float32), expected)  # stored as float32 by the reference

    for name, case in content["t_lang"].items():
        yield Case(f"t_lang/{name}/p", partial(tail, "en", case["t_en"], case["p"]))
        for language, expected in case["t_clamped"].items():
            limit = case["t_en"] if language == "en" else expected
            if language != "en":
                measure = partial(threshold, language, case["p"], expected)
                yield Case(f"t_lang/{name}/t/{language}", measure)
            if not case["degenerate"][language]:
                stored = arrays[f"lang_prob_ref_{name}_{language}"]
                measure = partial(probability, language, limit, stored)
                yield Case(f"t_lang/{name}/prob/{language}", measure)
    for fraction, thresholds in content["p_to_t"].items():
        for language, expected in thresholds.items():
            measure = partial(threshold, language, float(fraction), expected)
            yield Case(f"p_to_t/{fraction}/{language}", measure)
    for index, trip in enumerate(content["roundtrip"]):
        yield Case(f"roundtrip/{index}/p", partial(tail, trip["lang"], trip["t"], trip["p"]))
        measure = partial(threshold, trip["lang"], trip["p"], trip["t_back"])
        yield Case(f"roundtrip/{index}/t", measure)


def clipcov_select(content: dict, arrays: dict) -> Iterator[Case]:
    def order(fraction: float, expected: np.ndarray) -> float:
        members = [np.flatnonzero(arrays["class"] == k) for k in np.unique(arrays["class"])]
        labels = arrays["label_sim"]
        found = select(
            similarity=[arrays[f"S_{k}_q"] / 4096.0 for k in range(len(members))],
            raw=[arrays["raw"][rows] for rows in members],
            label_similarity=[labels[rows, k] for k, rows in enumerate(members)],
            centre_terms=[arrays["tic"][rows] + arrays["itc"][rows] for rows in members],
            fraction=fraction,
            variant="notebook",
        )
        return unequal(np.concatenate(members)[found], expected)

    for name, case in content.items():
        yield Case(name, partial(order, case["fraction"], arrays[f"order_{name}"]))


def semdedup(content: dict, arrays: dict) -> Iterator[Case]:
    cluster = arrays["cluster"]

    def order(rule: str, keep: str, expected: np.ndarray) -> float:
        similarity = arrays["sim_to_centroid"]
        found = rank(similarity_to_centroid=similarity, assignment=cluster, keep=keep, rule=rule)
        return unequal(found, expected)

    def similarity(taken: np.ndarray, expected: np.ndarray) -> float:
        embeddings = arrays["embeddings"]
        found = max_similarity(embeddings=embeddings, assignment=cluster, order=taken)
        return difference(found, expected)

    def removal(taken: np.ndarray, epsilon: float, strict: bool, expected: np.ndarray) -> float:
        rule = {"assignment": cluster, "order": taken, "epsilon": epsilon, "strict": strict}
        found = [
            removed(embeddings=arrays["embeddings"].astype(kind), **rule)
            for kind in (np.float32, np.float64)
        ]
        return max(unequal(ids, expected) for ids in found)

    for keep in ("hard", "easy"):
        for rule in ("semdedup", "curator"):
            expected = arrays[f"{rule}_order_{keep}"]
            yield Case(f"{rule}_order_{keep}", partial(order, rule, keep, expected))
            measure = partial(similarity, expected, arrays[f"{rule}_max_sim_{keep}"])
            yield Case(f"{rule}_max_sim_{keep}", measure, 1e-6)
        rule = "semdedup" if keep == "hard" else "curator"  # the ties of the ranking alone
        measure = partial(order, rule, keep, arrays[f"rank_order_{keep}"])
        yield Case(f"rank_order_{keep}", measure)
        for index, epsilon in enumerate(arrays["eps"].tolist()):
            for sign, rule in (("gt", "semdedup"), ("ge", "curator")):
                name = f"removed_{sign}_{keep}_{index}"
                taken = arrays[f"{rule}_order_{keep}"]
                measure = partial(removal, taken, epsilon, sign == "gt", arrays[name])
                yield Case(name, measure)
