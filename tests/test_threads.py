"""How long llama.cpp's threads wait awake: set for GGUF backbones before the library is loaded, and for no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram.cli import threads

SCRIPT = """
import os, sys
from pathlib import Path
from engram.cli.threads import share_processors
print(share_processors(Path(sys.argv[1])), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


def package(folder: Path, *names: str) -> Path:
    folder.mkdir()
    content = {"backbone": {"kind": "embedded", "path": "backbone", "sha256": dict.fromkeys(names, "")}}
    (folder / "engram.json").write_text(json.dumps(content))
    return folder


def asked(place: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(place)], env=kept | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_gguf_backbone_is_told_to_sleep(tmp_path: Path) -> None:
    assert asked(package(tmp_path / "gguf", "model.gguf")) == "True 1000 False"
    assert asked(tmp_path / "model.gguf") == "True 1000 False"
    assert asked(package(tmp_path / "hf", "config.json", "model.safetensors")) == "False None False"
    assert asked(tmp_path / "absent") == "False None False"


def test_what_the_user_says_counts(tmp_path: Path) -> None:
    made = package(tmp_path / "gguf", "model.gguf")
    assert asked(made, GOMP_SPINCOUNT="7") == "False 7 False"
    assert asked(made, OMP_WAIT_POLICY="active") == "False None False"


def test_a_library_that_is_loaded_read_its_settings_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not threads.share_processors(package(tmp_path / "gguf", "model.gguf"))
    assert "GOMP_SPINCOUNT" not in os.environ


def test_it_is_set_before_a_command_loads_torch(tmp_path: Path) -> None:
    """`engram run` itself: it ends at the package's missing fields, with the setting made and said to nobody."""
    made = package(tmp_path / "gguf", "model.gguf")
    script = "import sys, os; from engram.cli import main; sys.argv = ['engram', 'run', sys.argv[1], '--prompt', 'x']\n"
    script += "try: main.main()\nexcept SystemExit: print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", script, str(made)], env=kept, capture_output=True, text=True)
    assert done.stdout.strip().endswith("1000"), done.stderr
