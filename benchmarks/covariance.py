"""Covariance selection: ours beside a loop written from the notebook's description, and its memory.

    OMP_NUM_THREADS=1 python -m benchmarks.covariance

writes benchmarks/results/covariance.md. Times are CPU seconds of one thread; memory is the peak
resident set of a process of its own (ru_maxrss), the pool included.
`python -m benchmarks.covariance bounded '{"classes": "column", ...}'` is such a process.
"""

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation.select.covariance import Covariance, select

RESULT = Path(__file__).parent / "results" / "covariance.md"
ROUNDS = 2
WIDTH = 64


def loop_of_the_notebook(
    *, similarity, members, owner, raw, label_similarity, static, fraction, kind: bool
) -> list[int]:
    """The greedy with the notebook's bookkeeping: Python lists, a global ascending argsort after
    every update, the best at its end; at an update the places of the latest picks are searched for
    through the whole class, for the similarities and again for the labels.

    similarity: thresholded float32 matrices.
    kind: not what the notebook does: one search an update instead of two, and the picks in the
        lists are plain integers; numpy's, as argsort gives them, compare four times as slowly.
    """
    scores = static.copy()
    chosen: list[int] = []
    selected: list[list[int]] = [[] for _ in similarity]
    new: list[list[int]] = [[] for _ in similarity]

    def places(k: int) -> list[int]:
        return [place for place, row in enumerate(members[k]) if row in new[k]]

    ascending = np.argsort(scores)
    while len(chosen) < int(len(scores) * fraction):
        best = int(ascending[-1]) if kind else ascending[-1]
        k = owner[best]
        chosen.append(best)
        selected[k].append(best)
        new[k].append(best)
        if (len(selected[k]) + 1) % 200:
            ascending = ascending[:-1]
            continue
        rows, size, found, matrix = members[k], len(members[k]), places(k), similarity[k]
        scores[rows] -= (matrix[:, found].sum(axis=1) + matrix[found, :].sum(axis=0)) / size
        scores[rows] -= raw[selected[k]].sum() / size
        if not kind:
            places(k)
        scores[rows] -= label_similarity[new[k]].sum() / 2 / size
        scores[chosen] = -np.inf
        ascending = np.argsort(scores)[len(chosen) :]
        new[k] = []
    return [int(row) for row in chosen]


def problem(num_pairs: int, num_classes: int) -> dict:
    """Similarities of random pairs around class centres, rounded to 1/4096: float32 sums are exact,
    so that both codes see the same scores.
    """
    rng = np.random.default_rng(0)
    size = num_pairs // num_classes
    similarity, positive, raw, diagonal = [], [], [], []
    for _ in range(num_classes):
        centre = rng.normal(size=WIDTH)
        image = _unit(centre + 2.0 * rng.normal(size=(size, WIDTH))).astype(np.float32)
        text = _unit(image + 0.1 * rng.normal(size=(size, WIDTH))).astype(np.float32)
        matrix = np.rint((image @ text.T) * np.float32(4096)) / np.float32(4096)
        similarity.append(matrix)
        positive.append(matrix * (matrix > 0))
        raw.append((positive[-1].sum(0, np.float64) + positive[-1].sum(1, np.float64)) / size)
        diagonal.append(np.diagonal(matrix).astype(np.float64))
    label, centre = rng.uniform(0.1, 0.3, num_pairs), rng.uniform(0.0, 0.2, num_pairs)
    raw, diagonal = np.concatenate(raw), np.concatenate(diagonal)
    return {
        "similarity": similarity,
        "positive": positive,
        "raw": raw,
        "label_similarity": label,
        "centre_terms": centre,
        "static": raw + 2 * diagonal + label / 2 - centre,
        "members": [list(range(k * size, (k + 1) * size)) for k in range(num_classes)],
        "owner": [row // size for row in range(num_pairs)],
    }


def beside_the_loop(num_pairs: int, num_classes: int, fraction: float) -> dict[str, float]:
    """CPU seconds, best of ROUNDS taken in turn; the orders are asserted equal."""
    data = problem(num_pairs, num_classes)
    terms = {k: data[k] for k in ("similarity", "raw", "label_similarity", "centre_terms")}
    given = {k: data[k] for k in ("members", "owner", "raw", "label_similarity", "static")}
    given |= {"similarity": data["positive"]}
    ways = {
        "ours": lambda: select(**terms, fraction=fraction, variant="notebook").tolist(),
        "loop": lambda: loop_of_the_notebook(**given, fraction=fraction, kind=False),
        "kind": lambda: loop_of_the_notebook(**given, fraction=fraction, kind=True),
        "paper": lambda: select(**terms, fraction=fraction, variant="paper").tolist(),
    }
    seconds: dict[str, float] = {}
    orders: dict[str, list[int]] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            orders[name] = way()
            spent = time.process_time() - started
            seconds[name] = min(spent, seconds.get(name, spent))
        assert orders["ours"] == orders["loop"] == orders["kind"], "the orders differ"
    per_class = np.bincount(np.array(data["owner"])[orders["ours"]])
    return seconds | {"updates": int(((per_class + 1) // 200).sum())}


def parts(num_pairs: int, num_classes: int, rows: int = 20_000):
    """A pool as the selector gets it: uid, class and float32 embeddings."""
    rng = np.random.default_rng(0)
    centres = _unit(rng.normal(size=(num_classes, WIDTH)))
    for start in range(0, num_pairs, rows):
        owner = np.arange(start, min(start + rows, num_pairs)) % num_classes
        image = _unit(centres[owner] + 0.15 * rng.normal(size=(len(owner), WIDTH)))
        text = _unit(image + 0.08 * rng.normal(size=image.shape))
        columns = {
            name: pa.FixedSizeListArray.from_arrays(
                pa.array(values.astype(np.float32).ravel()), WIDTH
            ).cast(pa.list_(pa.float32()))
            for name, values in (("image_embed", image), ("text_embed", text))
        }
        uids = [f"{value:032x}" for value in rng.integers(0, 2**63, len(owner))]
        yield pa.table({"uid": uids, "topic": pa.array(owner, pa.int32()), **columns})


def bounded(
    num_pairs: int,
    num_classes: int,
    classes: str,
    variant: str,
    threshold: float | None,
    gib: float,
) -> dict[str, float | str]:
    """One selection over the whole seam, in this process: measure, combine, apply."""
    pool = list(parts(num_pairs, num_classes))
    selector = Covariance(
        fraction=0.3,
        variant=variant,
        num_classes=num_classes if classes == "k-means" else None,
        class_column="topic" if classes == "column" else None,
        threshold=threshold,
        memory_gib=gib,
    )
    before, wall = time.process_time(), time.perf_counter()
    combined = selector.combine([selector.measure(part) for part in pool])
    kept = [
        uid
        for part in pool
        for uid, reason in zip(
            part["uid"].to_pylist(), selector.apply(part, combined, 0).to_pylist(), strict=True
        )
        if reason is None
    ]
    assert len(kept) == int(0.3 * num_pairs)
    return {
        "cpu": time.process_time() - before,
        "wall": time.perf_counter() - wall,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "kept": hash(tuple(sorted(int(uid, 16) for uid in kept))),
    }


def in_a_process(**case: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.covariance", "bounded", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _case(num_pairs, num_classes, classes="column", variant="paper", threshold=0.0, gib=1.0):
    return {
        "num_pairs": num_pairs,
        "num_classes": num_classes,
        "classes": classes,
        "variant": variant,
        "threshold": threshold,
        "gib": gib,
    }


BOUNDED = (
    _case(100_000, 20),
    _case(100_000, 20, gib=0.06),
    _case(1_000_000, 1000),
    _case(1_000_000, 1000, threshold=None),
    _case(1_000_000, 1000, classes="k-means"),
)


def main() -> None:
    # first, while this process is small: a child starts with its parent's peak
    lines: list[str] = []
    for index, case in enumerate(BOUNDED):
        found = in_a_process(**case)
        threshold = "off" if case["threshold"] is None else case["threshold"]
        lines.append(
            f"| {case['num_pairs']:,} | {case['num_classes']:,} | {case['classes']} "
            f"| {case['variant']} | {threshold} | {case['gib']:g} "
            f"| {found['cpu']:.0f} | {found['wall']:.0f} | {found['rss']:.2f} |"
        )
        print(lines[-1], flush=True)
        if index == 0:
            held = found["kept"]
        if index == 1:
            assert held == found["kept"], "memory_gib changed the answer"
    speed = beside_the_loop(100_000, 20, 0.3)
    rows = (
        ("the notebook's loop", "loop"),
        ("the same, kinder: one search an update, plain integers", "kind"),
        ("ours", "ours"),
        ('ours, variant "paper" (an update a pick)', "paper"),
    )
    table = "\n".join(
        f"| {words} | {speed[name]:.2f} | {speed[name] / speed['ours']:.1f} |"
        for words, name in rows
    )
    print(table, flush=True)
    RESULT.write_text(
        f"""# Covariance selection

2026-11-23, 2 cores of a shared x86-64 server, one thread. Python {platform.python_version()}, numpy
{np.__version__}, pyarrow {pa.__version__}. `OMP_NUM_THREADS=1 python -m benchmarks.covariance`

## Beside the notebook's loop

n = 100,000 pairs in 20 classes, fraction 0.3, variant "notebook", {speed["updates"]} updates, the
same similarity matrices in memory. The loop is written from the notebook's description, without its
progress bar. CPU seconds, best of {ROUNDS} taken in turn; **the ordered lists are equal**
(asserted).

| | CPU seconds | ratio to ours |
|---|---|---|
{table}

## From embeddings, in bounded memory

The whole selector (measure, combine, apply) over a pool of parts, D = {WIDTH}, fraction 0.3. Peak
resident set of the process, the pool of Arrow tables included. The first two rows keep the same
pairs (asserted): the second never holds a class's similarities.

| pairs | classes | from | variant | threshold | memory_gib | CPU s | wall s | peak RSS GiB |
|---|---|---|---|---|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["bounded"]:
        print(json.dumps(bounded(**json.loads(sys.argv[2]))))
    else:
        main()
