"""The README's commands run as they stand, in order, on the real backbone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.real
def test_every_example_runs_in_order(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    section = text[text.index("## One example per command") :]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = {line.split()[1] for line in re.findall(r"^engram .*|(?<=\$\()engram .*", block[1], re.MULTILINE)}
    listed = set(re.findall(r"^## `engram ([a-z-]+)", (ROOT / "docs" / "cli.md").read_text("utf-8"), re.MULTILINE))
    assert listed <= commands, "every command has its example"
    for name in ("docs", "builders", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name, words in (("engram", " -m engram.cli.main"), ("python", "")):  # of the environment that is activated
        shim = tmp_path / "bin" / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        shim.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block[1]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "out" / "package" / "engram.json").is_file()
    assert "perplexity" in done.stdout
