"""The README's six commands, typed by somebody who has a folder of pictures."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.peer.test_open_clip import PYTHON, ROOT, pytestmark  # noqa: F401  (where open_clip is)

TITLE = "## Your own pictures, in six commands"


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split(TITLE)[1].split("\n## ")[0]
    return re.findall(r"^    (\S.*)$", section, flags=re.MULTILINE)


def test_the_readmes_six_commands(tmp_path, make_picture):
    for number in range(60):
        folder = tmp_path / "pictures" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(make_picture(number))
        (folder / f"{number}.txt").write_text(f"thing number {number}")
    first, *typed, last = commands()
    assert first == "make env && source .venv/bin/activate"
    assert len(typed) == 4
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    for command in typed:
        # as many pairs as a test may see
        short = command.replace("recipe=small", "recipe=small debug=tiny")
        done = subprocess.run(
            short, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert "r_at_1" in done.stdout or (tmp_path / "runs/mine/eval/retrieval.json").is_file()
    done = subprocess.run(
        last.replace("python", str(PYTHON), 1),
        shell=True,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"tensor\(\d", done.stdout)
