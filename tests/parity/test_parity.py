"""The fixtures through tests/parity/check.py, and that a wrong value is found."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data/parity"


def check(folder, only, cwd):
    command = [sys.executable, ROOT / "tests/parity/check.py", folder, "--only", only]
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    *cases, last = done.stdout.splitlines()
    return done.returncode, cases, last


@pytest.mark.parametrize(
    "only",
    [
        "metaclip_match,metaclip_balance,clipcov_select",
        "semdedup",
        "losses:clip_infonce,losses:siglip",
        "schedules",
        "token_masks",
    ],
)
def test_reference_values(only, tmp_path):
    code, cases, last = check(DATA, only, tmp_path)
    assert [case for case in cases if not case.startswith("ok ")] == []
    assert (code, last) == (0, f"{len(cases)} passed, 0 failed")


def test_wrong_values_fail(tmp_path):
    content = json.loads((DATA / "metaclip_match.json").read_text(encoding="utf-8"))
    content["v1"]["expected_ids"][7] = [1, 2, 3]
    (tmp_path / "metaclip_match.json").write_text(json.dumps(content))
    with np.load(DATA / "clipcov_select.npz") as stored:
        arrays = dict(stored)
    arrays["order_1_10"][[3, 4]] = arrays["order_1_10"][[4, 3]]
    np.savez(tmp_path / "clipcov_select.npz", **arrays)
    (tmp_path / "clipcov_select.json").write_text((DATA / "clipcov_select.json").read_text())
    code, cases, last = check(tmp_path, "metaclip_match,clipcov_select", tmp_path)
    assert [case.split()[1] for case in cases if case.startswith("FAIL")] == [
        "metaclip_match:v1/expected_ids",
        "clipcov_select:1_10",
    ]
    assert (code, last) == (1, "6 passed, 2 failed")


def test_what_is_missing_counts_as_failed(tmp_path):
    (tmp_path / "schedules.json").write_text(json.dumps({"a_later_family": {}}))
    (tmp_path / "semdedup.npz").symlink_to(DATA / "semdedup.npz")
    code, cases, last = check(tmp_path, "schedules,nothing,semdedup:nothing", tmp_path)
    assert [case.split()[0] for case in cases] == ["missing", "FAIL", "FAIL"]
    assert (code, last) == (1, "0 passed, 3 failed")
