"""The study behind docs/quantization.md: what tables in fewer bits cost, on real backbones, memories and text.

    python benchmarks/quantization_study.py WORK [--only smollm2-python] [--tokens 16384] [--quick]

WORK holds the memories that benchmarks/memories.py made. Every codec, mixed plans at several budgets, and the grid of
tables and backbones are measured against the float model on held-out documents, with their controls. Rows are encoded
and decoded as an artifact would hold them, bit for bit. Each figure is kept in WORK/study.json as soon as it is there,
and not measured again for the same settings; then docs/quantization.md and its pictures are written anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantization_report
from outcome import Lines

from engram import Progress, __version__
from engram.builders.atomic import write_whole
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.token_cache import TokenCache
from engram.kernels.codecs import CODECS, CodecError, find_codec
from engram.quantize.backbone import BackboneConfig, quantize_backbone
from engram.quantize.plan import TablePlan, frequent_plan
from engram.runtime.calibrate import RowWeights, count_rows, with_openings
from engram.runtime.evaluate import Sample
from engram.runtime.plan_search import look_at, total_bytes, within_bytes
from engram.runtime.quality import Judge, layers_of, shuffled_rows, zero_rows
from engram.runtime.quality_gate import QualityConfig, context_of, float_model, read_windows, windows_of
from engram.runtime.readout import Readout
from engram.runtime.row_sources import FloatTables, PlannedRows

BUDGETS = (1.0, 0.75, 0.6, 0.4)  # of what nf4 takes
GRID_TABLES = ("f32", "int8", "nf4", "h2")
GRID_BACKBONES = ("int8", "int4")
TOKENS = {  # by memory, else by backbone
    "smollm2": 16_384, "gemma3": 3_072,  # Gemma's vocabulary of 262,144 makes a token five times as dear
    "smollm2-bible-middle": 8_192,  # a memory in the middle needs the whole backbone for every arm
}  # fmt: skip


class Study:
    """One memory: its judge, and its part of study.json."""

    def __init__(self, name: str, told: dict[str, Any], work: Path, tokens: int, seen: Progress) -> None:
        self.name, self.told, self.work, self.seen = name, told, work, seen
        self.kept = work / "study" / f"{name}.json"
        self.key = f"{told['checkpoint']} {told['gain']} {tokens} engram {__version__}"
        found = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        self.found: dict[str, Any] = found if found.get("key") == self.key else {"key": self.key}
        self.tokens, self._judge = tokens, None
        self.checkpoint: Checkpoint = open_checkpoint(Path(told["checkpoint"]))
        self.rows = FloatTables(self.checkpoint)

    @property
    def judge(self) -> Judge:
        """The float model on held-out windows, opened when the first figure is missing."""
        if self._judge is None:
            text = CorpusConfig((self.told["parts"]["held_out"],))
            model = float_model(self.checkpoint)
            config = QualityConfig(text, max_tokens=self.tokens)
            windows, _ = read_windows(self.checkpoint, config, context_of(model), self.seen)
            self._judge = Judge(model, self.rows, windows, self.seen)
        return self._judge

    def figure(self, group: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Measure one figure, unless it is there."""
        part = self.found.setdefault(group, {})
        if name not in part:
            self.seen.say(f"{self.name}: {group}: {name}")
            begin = time.perf_counter()
            part[name] = work() | {"seconds": time.perf_counter() - begin}
            self.kept.parent.mkdir(exist_ok=True)
            write_whole(self.kept, json.dumps(self.found, indent=1).encode())

    def measured(self, rows: Any, readout: Readout | None = None) -> dict[str, Any]:
        """What is recorded of one arm."""
        judge = self.judge
        measured = judge.measure(rows, readout)
        return {
            "loss": judge.loss(measured), "change": judge.change(measured, 0),
            "gain_kept": judge.gain_kept(measured, 0), **judge.divergence(measured, 0),
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """All figures of this memory."""
        self.figure("controls", "text", lambda: {
            "tokens": len(self.judge.document_N), "documents": len(set(self.judge.document_N.tolist())),
            "backbone": self.judge.loss(self.judge.base), "float": self.judge.loss(self.judge.float),
        })  # fmt: skip
        self.figure("controls", "zero table", lambda: self.measured(zero_rows(self.rows)))
        self.figure(
            "controls", "shuffled rows", lambda: self.measured(shuffled_rows(self.rows, self.checkpoint.layout, 0))
        )
        for name in self.codecs():
            self.figure("codecs", name, lambda name=name: self.plan(self.uniform(name)))
        self.mixed()
        self.grid()
        return self.found

    def codecs(self) -> list[str]:
        """Those that the width allows, without q8_0 (int8's numbers) and those that are only read."""
        found = []
        for name in CODECS:
            try:
                find_codec(name).row_bytes(self.checkpoint.layout.head_dim)
            except CodecError:
                continue
            if name not in ("f32", "q8_0", "fp8-tensor", "nvfp4"):
                found.append(name)
        return found

    def uniform(self, codec: str) -> dict[int, TablePlan]:
        layout = self.checkpoint.layout
        return {n: TablePlan.uniform(codec, layout) for n in layout.layers}

    def plan(self, plans: dict[int, TablePlan]) -> dict[str, Any]:
        """A plan's figures, its bytes and its row errors."""
        layout = self.checkpoint.layout
        rows = PlannedRows(self.rows, layout, plans)
        values = sum(layout.table_rows[n] * layout.head_dim for n in layout.layers)
        return self.measured(rows) | {
            "bytes": total_bytes(plans, layout), "bits_per_value": 8 * total_bytes(plans, layout) / values,
            "row_error": layers_of(self.judge.row_errors(rows)),
            "classes": {str(n): plan.to_json(layout, n)["classes"] for n, plan in plans.items()},
        }  # fmt: skip

    def mixed(self) -> None:
        """Plans that the text for calibration chose, at shares of what nf4 takes; and dropping what it never read."""
        wanted = [*(f"auto at {b:g} of nf4" for b in BUDGETS), "int8, unseen rows in h2", "nf4, unseen dropped"]
        if all(name in self.found.get("mixed", {}) for name in wanted):
            return
        layout = self.checkpoint.layout
        weights = self.weights()
        values = {n: dense["value_proj.weight"] for n, dense in self.checkpoint.dense().items()}
        tables = look_at(self.rows, layout, weights, values)
        nf4 = total_bytes(self.uniform("nf4"), layout)
        for name, budget in zip(wanted, BUDGETS, strict=False):
            self.figure(
                "mixed", name, lambda budget=budget: self.plan(within_bytes(tables, layout, int(budget * nf4), False))
            )
        options: dict[str, Any]
        for name, codec, options in (
            (wanted[-2], "int8", {"unseen": "h2"}), (wanted[-1], "nf4", {"drop_unseen": True}),
        ):  # fmt: skip
            plans = {
                n: frequent_plan(codec, layout, (weights[n].rows_U, weights[n].weight_U), **options)
                for n in layout.layers
            }
            self.figure("mixed", name, lambda plans=plans: self.plan(plans))

    def weights(self) -> dict[int, RowWeights]:
        """From all parts but the held-out one."""
        parts = [self.told["parts"][part] for part in ("fill", "train", "calibrate") if part in self.told["parts"]]
        cache = TokenCache.build(CorpusConfig(tuple(parts)), self.checkpoint.folder / "tokenizer.json", self.seen)
        layout = self.checkpoint.layout
        weights = count_rows(cache, layout, range(cache.documents), self.seen)
        model = self.judge.readout.engram
        windows, _ = windows_of(self.checkpoint.folder, cache, Sample(2_048), context_of(model))
        return with_openings(weights, Judge(model, self.rows, windows, self.seen))

    def grid(self) -> None:
        """Tables x backbones."""
        layout = self.checkpoint.layout
        for kind in GRID_BACKBONES:
            names = [f"{codec} x {kind}" for codec in (*GRID_TABLES, "none")]
            if all(name in self.found.get("grid", {}) for name in names):
                continue
            out = self.work / "study" / f"{self.name}-{kind}"
            if not (out / "backbone.json").exists():
                source = self.checkpoint.backbone
                config = BackboneConfig(source, self.checkpoint.folder, out, kind)
                report, reference = quantize_backbone(config, self.seen)
                told = {"report": report, "reference": reference.to_json()}
                write_whole(out / "backbone.json", json.dumps(told, default=str).encode())
            told = json.loads((out / "backbone.json").read_text())
            reference = BackboneRef.from_json(told["reference"])
            self.found.setdefault("backbones", {})[kind] = {
                name: told["report"][name] for name in ("type", "bytes_before", "bytes")
            }
            readout = Readout(float_model(self.checkpoint, reference, out))
            for codec, name in zip((*GRID_TABLES, "none"), names, strict=True):
                rows = PlannedRows(self.rows, layout, self.uniform(codec)) if codec != "none" else None
                self.figure("grid", name, lambda rows=rows: self.measured(rows, readout))


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", help="names of memories, with commas")
    parser.add_argument("--tokens", type=int, default=0, help="held-out tokens a memory (0: as TOKENS says)")
    parser.add_argument("--page", type=Path, default=Path("docs/quantization.md"))
    given = parser.parse_args()
    memories = json.loads((given.work / "memories.json").read_text())
    chosen = [name for name in memories if not given.only or name in given.only.split(",")]
    found = {}
    for name in chosen:
        tokens = given.tokens or TOKENS.get(name, TOKENS[memories[name]["settings"]["backbone"]])
        found[name] = Study(name, memories[name], given.work, tokens, Lines()).run()
    quantization_report.write(found, {name: memories[name] for name in chosen}, given.page)


if __name__ == "__main__":
    sys.exit(main())
