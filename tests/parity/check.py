"""Run parity fixtures through our code: python tests/parity/check.py DIR [--only FILE[:CASE],...]

A line a case: `ok|FAIL|missing FILE:CASE` with the largest difference and the tolerance; last
`N passed, N failed`; exit 1 on any failure. `missing`: we have no code for the case yet; it counts
as failed. CASE selects the case itself and all below it (`losses:clip_infonce`). The README beside
the fixtures tells what they hold; names, sizes and values of the cases are read from the files.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np

# runs without an installation, from anywhere
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from case import Case  # noqa: E402

# Imported only when asked for: curation's cases need no torch.
READERS = {
    "metaclip_match": "cases_curation",
    "metaclip_balance": "cases_curation",
    "clipcov_select": "cases_curation",
    "semdedup": "cases_curation",
    "losses": "cases_training",
    "token_masks": "cases_training",
    "schedules": "cases_schedules",
}


def cases_of(folder: Path, file: str) -> list[Case]:
    """All cases of a fixture; one nameless case without code for a fixture that nothing reads."""
    if file not in READERS:
        return [Case("*", None)]
    content, arrays = {}, {}
    if (folder / f"{file}.json").exists():
        content = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
    if (folder / f"{file}.npz").exists():
        with np.load(folder / f"{file}.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
    reader = getattr(importlib.import_module(READERS[file]), file)
    return list(reader(content, arrays))


def run(case: Case) -> tuple[str, str]:
    """(status, remark) of a case. An exception is that case's failure, never the end of the run."""
    if case.measure is None:
        return "missing", "no code for it yet"
    try:
        largest = float(case.measure())
    except Exception as error:
        return "FAIL", f"{type(error).__name__}: {error}"
    status = "ok" if largest <= case.tolerance else "FAIL"
    return status, f"difference {largest:.3g}, tolerance {case.tolerance:.3g}"


def wanted(folder: Path, only: str | None) -> list[tuple[str, str]]:
    """(file, case or "") of what was asked for: every fixture of the folder by default."""
    if only is None:
        files = {path.stem for path in folder.iterdir() if path.suffix in (".json", ".npz")}
        return [(file, "") for file in sorted(files)]
    parts = [item.strip().partition(":") for item in only.split(",") if item.strip()]
    return [(file, case) for file, _, case in parts]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run parity fixtures through our code.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", metavar="FILE[:CASE],...")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    passed = failed = 0
    for file, prefix in wanted(options.folder, options.only):
        try:
            if not any((options.folder / f"{file}.{end}").exists() for end in ("json", "npz")):
                raise FileNotFoundError(f"no {file}.json or {file}.npz in {options.folder}")
            cases = cases_of(options.folder, file)
        except Exception as error:  # a fixture of another form fails as a whole, the rest goes on
            print(f"FAIL    {file}: {type(error).__name__}: {error}")
            failed += 1
            continue
        chosen = [c for c in cases if not prefix or f"{c.name}/".startswith(f"{prefix}/")]
        if not chosen:
            print(f"FAIL    {file}:{prefix}: no such case")
            failed += 1
        for case in chosen:
            status, remark = run(case)
            print(f"{status:7} {file}:{case.name}  {remark}")
            passed, failed = passed + (status == "ok"), failed + (status != "ok")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
