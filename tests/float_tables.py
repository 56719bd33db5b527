"""Small float checkpoints without a backbone, a progress that counts, and children that can be killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress, Task
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import save_checkpoint
from engram.builders.layout import Layout
from engram.kernels.codecs import Floats

WIDTH = 8


def checkpoint(
    out: Path, *, tables: dict[int, Floats] | None = None, width: int = WIDTH, rows_per_head: int = 200
) -> dict[int, Floats]:
    """A float checkpoint folder of two layers; its tables."""
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=width, layers=(1, 5), rows_per_head=rows_per_head, pad_id=2,
        vocab_size=40, token_map=np.arange(40),
    )  # fmt: skip
    generator = np.random.default_rng(0)
    rows = {n: generator.normal(size=(layout.table_rows[n], width)).astype(np.float32) for n in layout.layers}
    rows |= tables or {}
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text('{"made": "up"}')
    (tokenizer / "tokenizer_info.json").write_text("{}")
    save_checkpoint(
        out, layout=layout, gates={n: {"hidden": 3} for n in layout.layers},
        dense={n: {"value_proj.weight": np.full((3, 16), n, np.float32)} for n in layout.layers}, tables=rows,
        backbone=BackboneRef("hf", "some/model"), tokenizer_folder=tokenizer, extra={"trained": {"steps": 3}},
        state={"optimizer.json": b"{}"},
    )  # fmt: skip
    return rows


class Recorder(Progress):
    """Counts what a worker says that it did."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def task(self, label: str, total: float | None = None, unit: str = "") -> Task:
        done = self.done

        class Counting(Task):
            def advance(self, amount: float = 1) -> None:
                done[label] = done.get(label, 0) + amount

        return Counting()


def run_child(code: str, *arguments: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)
