"""What a run says while it runs: one JSON object a step in log.jsonl, a curve in loss.png, how far the gates open."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.builders.atomic import write_whole
from engram.builders.data import NOT_A_TARGET
from engram.builders.engram import Gate
from engram.builders.model import EngramModel


class Log:
    """log.jsonl of a run, cut back to the step that a resumed run goes on from."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [record for record in read_log(path) if record["step"] <= step]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self.records = kept

    def write(self, record: dict[str, Any]) -> None:
        """Append one step; handed to the operating system at once, so that a kill of the process loses none."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a line that a kill cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """The loss over tokens, training and held out, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=110)
    for key, style in (("loss", {"lw": 0.8, "alpha": 0.6}), ("val_loss", {"marker": "o", "ms": 3})):
        points = [(r["tokens"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label={"loss": "training", "val_loss": "held out"}[key], **style)
            axes.legend()
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    half = path.with_name(path.name + ".partial")
    figure.tight_layout()
    figure.savefig(half, format="png")
    pyplot.close(figure)
    os.replace(half, path)


class GateMeter:
    """How far the gates open at real positions, collected from every forward pass until `read`."""

    def __init__(self, model: EngramModel) -> None:
        self._seen: list[Tensor] = []
        self._values: list[Tensor] = []
        for gate in model.gates.values():
            assert isinstance(gate, Gate)
            self._watch(gate)

    def _watch(self, gate: Gate) -> None:
        opened = gate.open

        def open_and_keep(hidden_BTMD: Tensor, memory_BTE: Tensor) -> Tensor:
            gate_BTM = opened(hidden_BTMD, memory_BTE)
            self._seen.append(gate_BTM.detach())
            return gate_BTM

        setattr(gate, "open", open_and_keep)

    def select(self, targets_BT: Tensor) -> None:
        """Keep the real positions of the forward pass that just ran."""
        real = targets_BT != NOT_A_TARGET
        self._values += [gate_BTM[real].flatten() for gate_BTM in self._seen]
        self._seen.clear()

    def read(self) -> dict[str, float]:
        """Mean and 95th percentile since the last call."""
        self._seen.clear()
        if not self._values:
            return {}
        values = torch.cat(self._values)
        self._values.clear()
        rank = max(1, -(-95 * values.numel() // 100))
        return {"gate_mean": float(values.mean()), "gate_p95": float(values.kthvalue(rank).values)}


def rss_mb() -> float:
    """Resident memory of this process now, in MB; the peak where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
