"""The demo at its small size: every step, the table at the end, and a second call that finds all of it done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_folder_of_the_users_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine" / "layout").mkdir(parents=True)
    (tmp_path / "mine" / "layout" / "layout.json").write_text("{}")
    command = [sys.executable, "-m", "engram.cli.main", "demo", "--small", "--out", str(tmp_path / "mine")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "was not made by engram demo" in done.stderr
    assert (tmp_path / "mine" / "layout" / "layout.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["layout"]


@pytest.mark.real
def test_the_whole_path_at_small_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engram.cli.main", "demo", "--small", "--out", str(tmp_path / "demo")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-4000:]
    for words in ("backbone alone", "with memory (nf4)", "zero table", "shuffled rows", "95 % interval", "disk"):
        assert words in first.stdout
    again = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stderr.count("done before") == 8
    (tmp_path / "demo" / "figures" / "eval.json").unlink()
    third = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert third.stderr.count("done before") == 6, "a step without figures is done again, and those after it"
    result = json.loads(again.stdout)
    assert result["run"]["identical"] is True
    assert result["export"]["verify"]["ok"] is True
    held = result["eval"]["held_out"]
    assert held["zero_table"]["nll"] == pytest.approx(held["backbone"]["nll"], abs=2e-3)
    assert {"none", "ram", "disk"} <= set(result["run"])
