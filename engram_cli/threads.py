"""How long threads of llama.cpp wait for each other awake, set before anything loads the OpenMP library."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SPINS = "1000"  # turns of a waiting loop, about 10 microseconds
_SAID = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def share_processors(package: Path) -> bool:
    """For a GGUF backbone, let a thread that waits for another one sleep soon; whether that was set.

    llama.cpp's threads meet several hundred times a token. By default each waits awake for milliseconds: where another
    program has a processor, the thread that is waited for cannot run meanwhile, and decoding falls to one token a
    second. What the environment says already counts; so does a library that is loaded. torch's own waits stay as they
    are for other backbones: it loses 4 % by this.
    """
    if any(name in os.environ for name in _SAID) or "torch" in sys.modules or not _is_gguf(package):
        return False
    os.environ[_SAID[0]] = SPINS
    return True


def _is_gguf(package: Path) -> bool:
    if package.suffix == ".gguf":
        return True
    try:
        backbone = json.loads((package / "engram.json").read_bytes())["backbone"]
        return any(str(name).endswith(".gguf") for name in backbone["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whoever opens it says what is wrong
