"""`engram quantize`: tables and backbone in fewer bits, chosen by a text and judged by one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram import EngramError
from engram.cli import options, progress, ui
from engram.cli.inspect import plan_words, quality_words
from engram.cli.sizes import parse_count, parse_size, show_bytes

MOST_SAMPLED = 10_000_000
CODECS = "int8 int8-row nf4 q4_0 h4 h3 h2 h1 q8_0 iq4_nl fp8-e8m0 fp8-row bf16 f32".split()


def _codec_names(incomplete: str) -> list[str]:
    return [name for name in (*CODECS, "auto") if name.startswith(incomplete)]


class UsageError(EngramError):
    """Options that do not belong together, or that cannot be read."""


def quantize(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A float checkpoint (train, fill); with --sample anything.")
    ],
    out: Annotated[Optional[Path], typer.Option("--out", metavar="PATH", help="Where to write; whole or not at all.")]
    = None,
    tables: Annotated[
        str,
        typer.Option(
            "--tables", metavar="CODEC|auto", autocompletion=_codec_names,
            help=f"How to store the rows: {', '.join(CODECS)}; auto chooses for each row.",
        ),
    ] = "int8",
    gate: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="Judge the result against the float model on this held-out text."),
    ] = [],
    max_loss: Annotated[
        Optional[str],
        typer.Option(metavar="X", help="How much the loss may grow: 0.5% or 0.002 (nats). Beyond: exit 1, kept aside."),
    ] = None,
    gate_tokens: Annotated[
        Optional[str], typer.Option(metavar="N", help="Tokens that the gate reads: 16k unless told.")
    ] = None,
    calibrate: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="Text that shows which rows are read, and how far gates open; repeatable."),
    ] = [],
    budget: Annotated[
        Optional[str], typer.Option(metavar="SIZE", help="For auto: the most that all tables may take.")
    ] = None,
    frequent: Annotated[
        Optional[str],
        typer.Option(metavar="CODEC:SHARE", help="A finer codec for this share of the rows that TEXT reads: int8:10%."),
    ] = None,
    unseen: Annotated[
        Optional[str], typer.Option(metavar="CODEC", help="A coarser codec for rows that TEXT never reads.")
    ] = None,
    drop_unseen: Annotated[
        bool, typer.Option("--drop-unseen", help="Do not store rows that TEXT never reads; they read as zeros.")
    ] = False,
    backbone: Annotated[
        Optional[str],
        typer.Option(
            "--backbone", metavar="TYPE",
            help="The backbone too: int8 or int4 (torchao), or a GGUF type (q8_0, q4_k_m, …) through llama.cpp.",
        ),
    ] = None,
    backbone_from: Annotated[
        Optional[Path], typer.Option(metavar="PATH", help="Quantize this GGUF, not the checkpoint's own backbone.")
    ] = None,
    override: Annotated[
        list[str], typer.Option(metavar="REGEX=TYPE", help="GGUF: another type for tensors of this name; repeatable.")
    ] = [],
    embedding_type: Annotated[
        Optional[str], typer.Option(metavar="TYPE", help="GGUF: the type of the token embedding.")
    ] = None,
    output_type: Annotated[
        Optional[str], typer.Option(metavar="TYPE", help="GGUF: the type of the output head.")
    ] = None,
    importance: Annotated[
        list[str],
        typer.Option(metavar="TEXT|FILE.gguf", help="GGUF: weigh errors by the inputs over this text; repeatable."),
    ] = [],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Allow a backbone that is quantized already; errors add up.")
    ] = False,
    sample: Annotated[
        Optional[str],
        typer.Option(metavar="N", help="Write nothing: report what each codec does to N rows drawn at random."),
    ] = None,
    seed: options.Seed = 0,
    field: options.Field = "text",
    suffix: options.Suffixes = [],
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Store tables in fewer bits, and measure what that costs."""
    if sample is not None:
        others = {
            "--out": out, "--gate": gate, "--max-loss": max_loss, "--gate-tokens": gate_tokens, "--force": force,
            "--calibrate": calibrate, "--budget": budget, "--frequent": frequent, "--unseen": unseen,
            "--drop-unseen": drop_unseen, "--backbone": backbone,
        }  # fmt: skip
        for name, value in others.items():
            if value:
                raise UsageError(f"--sample writes nothing and does not use {name}", hint="leave one of them out")
        return _sampled(checkpoint, tables, parse_count(sample), seed, json)
    if gate_tokens is not None and not gate:
        raise UsageError("--gate-tokens is given, but there is no gate", hint="give --gate TEXT")
    if out is None:
        raise UsageError("--out is missing", hint="say where to write, or give --sample N to only look")
    from engram.builders.corpus import CorpusConfig
    from engram.runtime.quantize_config import BackboneWish, Bound, QuantizeRun
    from engram.runtime.quantize_run import quantize_run

    def text(sources: list[str]) -> CorpusConfig | None:
        return CorpusConfig(tuple(sources), field=field, suffixes=tuple(suffix)) if sources else None

    matrix = Path(importance[0]) if len(importance) == 1 and importance[0].endswith(".gguf") else text(importance)
    details = (backbone_from, override, embedding_type, output_type, importance, requantize)
    if backbone is None and any(details):
        raise UsageError("options of the backbone need --backbone TYPE", hint="for example --backbone q8_0")
    wish = None if backbone is None else BackboneWish(
        backbone, backbone_from, tuple(_override(part) for part in override), embedding_type, output_type, matrix,
        requantize=requantize,
    )  # fmt: skip
    config = QuantizeRun(
        checkpoint, out, tables, text(calibrate), None if frequent is None else parse_share(frequent), unseen,
        drop_unseen, None if budget is None else parse_size(budget),
        None if max_loss is None else Bound.parse(max_loss), text(gate), parse_count(gate_tokens or "16k"), seed=seed,
        backbone=wish, force=force,
    )  # fmt: skip
    result = quantize_run(config, progress.on_screen())
    passed = result.get("passed", True)
    if json:
        ui.emit(result)
    else:
        _table(result["tables"])
        if "plans" in result:
            print(plan_words({**result, "layers": result["plans"]}))
        if result["backbone"] != "unchanged":
            part = result["backbone"]
            before = f"{show_bytes(part['bytes_before'])} to " if part["bytes_before"] else ""
            print(
                f"backbone as {part['type']}: {before}{show_bytes(part['bytes'])}, "
                f"{len(part['modules'])} matrices; {len(part['left'])} left as they are"
            )
        if "quality" in result:
            print(quality_words(result["quality"]))
        print(f"{'quantized into' if passed else 'kept aside as'} {result['out']}")
    if not passed:
        ui.error(UsageError(
            f"the loss grows by more than --max-loss {max_loss} allows: {result['out']} is marked as rejected",
            hint="raise --budget or --max-loss" if tables == "auto" else
            "use a finer codec, or --tables auto, which finds the cheapest that passes",
        ))  # fmt: skip
        raise typer.Exit(1)


def parse_share(text: str) -> tuple[str, float]:
    """"int8:10%" or "int8:0.1"."""
    codec, _, share = text.rpartition(":")
    try:
        value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not codec or not 0 < value < 1:
        raise UsageError(
            f"--frequent {text!r} is no codec with a share between 0 and 100 %", hint="for example int8:10%"
        )
    return codec, value


def _override(text: str) -> tuple[str, str]:
    pattern, _, kind = text.rpartition("=")
    if not pattern or not kind:
        raise UsageError(f"--override {text!r} is no REGEX=TYPE", hint="for example ffn_down=q6_k")
    return pattern, kind


def _table(tables: dict[str, Any]) -> None:
    rows = [
        [layer, row["codec"], show_bytes(row["bytes_before"]), show_bytes(row["bytes"]),
         f"{8 * row['bytes'] / row['rows'] / row['width']:.2f}", f"{row['rel_error']:.3%}"]
        for layer, row in tables.items()
    ]  # fmt: skip
    ui.table("", ["layer", "codec", "before", "after", "bits a value", "relative error"], rows)


def _sampled(source: Path, tables: str, count: int, seed: int, json: bool) -> None:
    from engram.quantize.row_report import row_report

    if tables == "auto":
        raise UsageError("--sample compares codecs by name, auto is none", hint="for example --tables int8,nf4,h2")
    if count > MOST_SAMPLED:
        raise UsageError(f"--sample {count:,} is more than {MOST_SAMPLED:,} rows", hint="1M rows are plenty")
    result = row_report(source, tables.split(","), count, seed=seed, progress=progress.on_screen())
    if json:
        return ui.emit(result)
    rows = [
        [layer, name, f"{row['bits_per_value']:.2f}", f"{row['rel_error']:.3%}",
         f"{row['ci95'][0]:.3%} to {row['ci95'][1]:.3%}", f"{row['p99_row']:.2%}", f"{row['worst_row']:.2%}"]
        for layer, figures in result["layers"].items() for name, row in figures["codecs"].items()
    ]  # fmt: skip
    columns = ["layer", "codec", "bits a value", "relative error", "95 %", "99th percentile row", "worst row"]
    stored = ", ".join(dict.fromkeys(figures["stored_as"] for figures in result["layers"].values()))
    ui.table(f"{count:,} rows of each layer, drawn at random, against what is stored: {stored}", columns, rows)
