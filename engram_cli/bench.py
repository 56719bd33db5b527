"""`engram bench`: what this machine's disk and memory give, and how near the package comes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from engram.cli import options, progress, ui
from engram.cli.sizes import parse_ints, parse_seconds, show_bytes

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Package = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A package folder.")]
Text = Annotated[
    Optional[Path],
    typer.Option("--text", metavar="FILE", help="Real text to hash; without it, this Python's own documentation."),
]


@app.command("rows")
def bench_rows(
    package: Package,
    text: Text = None,
    rows: Annotated[str, typer.Option("--rows", metavar="N,N", help="Rows a call.")] = "32,512,16384,131072",
    warm: Annotated[bool, typer.Option("--warm/--no-warm", help="With all pages in the page cache.")] = True,
    cold: Annotated[bool, typer.Option("--cold/--no-cold", help="With none of them there.")] = True,
    seconds: Annotated[str, typer.Option(metavar="TIME", help="How long to measure, warm and cold each.")] = "30s",
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of every kernel.", min=1)] = 1,
    layer: Annotated[Optional[int], typer.Option(metavar="N", help="Whose table; default: the first.")] = None,
    peers: Annotated[
        Optional[str],
        typer.Option(metavar="A,B", help="Of numpy, torch, engramdb, fbgemm, ggml; default: all installed."),
    ] = None,
    io: Annotated[
        str, typer.Option("--io", metavar="A,B", help="Back ends of the table: auto, mmap, uring, pread, numpy.")
    ] = "auto",
    plot: Annotated[Optional[Path], typer.Option("--plot", metavar="PNG", help="Draw rows/s into this file.")] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Rows a second, warm and cold, beside peers and limits."""
    from engram.runtime import bench_report
    from engram.runtime.bench_rows import BenchRowsConfig
    from engram.runtime.bench_rows import bench_rows as work

    config = BenchRowsConfig(
        package=package,
        text=text,
        rows=parse_ints(rows),
        warm=warm,
        cold=cold,
        seconds=parse_seconds(seconds),
        threads=threads,
        layer=layer,
        peers=None if peers is None else _names(peers),
        backends=_names(io),
        seed=seed,
    )
    if plot is not None:
        bench_report.check_plot(plot)
    result = work(config, progress.on_screen()) | {"machine": bench_report.machine()}
    if plot is not None:
        bench_report.save_plot(plot, result)
        result["plot"] = plot
    ui.emit(result) if json else _rows_words(result)


@app.command("hash")
def bench_hash(
    folder: Annotated[Path, typer.Argument(metavar="LAYOUT|PACKAGE", help="A layout, checkpoint or package folder.")],
    text: Text = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="N,N", help="Tokens a call.")] = "1,512,8192",
    seconds: Annotated[str, typer.Option(metavar="TIME", help="How long to measure.")] = "10s",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Tokens hashed a second, beside the demo's method."""
    from engram.runtime import bench_report
    from engram.runtime.bench_hash import BenchHashConfig
    from engram.runtime.bench_hash import bench_hash as work

    config = BenchHashConfig(
        folder=folder, text=text, tokens=parse_ints(tokens), seconds=parse_seconds(seconds), seed=seed
    )
    result = work(config, progress.on_screen()) | {"machine": bench_report.machine()}
    ui.emit(result) if json else _hash_words(result)


@app.command("decode")
def bench_decode(
    package: Package,
    prompt: Annotated[
        Optional[str], typer.Option("--prompt", metavar="TEXT", help="Text to go on from; without it, Python's own.")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to decode in a round.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds of every placement.", min=1)] = 7,
    arms: Annotated[
        str, typer.Option(metavar="A,B", help="Which of none, ram, disk_warm, disk_cold.")
    ] = "none,ram,disk_warm,disk_cold",
    threads: Annotated[Optional[int], typer.Option(metavar="N", help="Threads of torch.", min=1)] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Tokens a second, tables in memory and on disk."""
    from engram.runtime import bench_report
    from engram.runtime.bench_decode import BenchDecodeConfig
    from engram.runtime.bench_decode import bench_decode as work

    config = BenchDecodeConfig(
        package=package,
        prompt=prompt,
        tokens=tokens,
        rounds=rounds,
        arms=_names(arms),
        seed=seed,
        threads=threads,
    )
    result = work(config, progress.on_screen()) | {"machine": bench_report.machine()}
    ui.emit(result) if json else _decode_words(result)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _rows_words(result: dict[str, Any]) -> None:
    from engram.runtime.bench_report import rates

    table = result["table"]
    print(
        f"layer {table['layer']}: {table['rows']:,} rows of {table['row_bytes']} bytes ({table['codec']},"
        f" {show_bytes(table['bytes'])}), kernels {result['kernels']}, rows by {result['io']['name'] or 'mapping'}"
    )
    for state in ("warm", "cold"):
        for trace in ("text", "uniform") if state in result else ():
            words = {"text": f"real text ({result['text']['source']})", "uniform": "drawn evenly from the table"}
            ui.table(f"{state.capitalize()}: rows of {words[trace]}", *rates(result[state]["results"], trace))
    if "warm" in result:
        print(f"warm proven by mincore: {result['warm']['resident_share_before']:.2%} of the pages were resident")
    if "cold" in result:
        cold, device = result["cold"], result["device"]
        print(f"cold proven by mincore: at most {cold['resident_share_most']:.3%} of the pages were resident")
        depths = ", ".join(f"depth {depth}: {rate:,.0f}" for depth, rate in device["reads_per_second"].items())
        print(f"the device's own 4 KiB reads a second{'' if device['direct'] else ' (buffered)'}: {depths}")
        own = [entry for entry in cold["results"] if entry["name"] == "engram" and entry["trace"] == "text"]
        for entry in own:
            print(f"  R = {entry['rows']:,}: {entry['device_bytes_per_row']:,.0f} bytes read from the device a row")
    _left_out(result)


def _hash_words(result: dict[str, Any]) -> None:
    cells = [
        [entry["name"], f"{entry['tokens']:,}", f"{entry['tokens_per_second']:,.0f}", f"{entry['us_per_call']:,.1f}",
         "-" if entry["times_the_demo"] is None else f"{entry['times_the_demo']:.1f}"]
        for entry in result["results"]
    ]  # fmt: skip
    ui.table(
        f"Hashing for layers {', '.join(map(str, result['layers']))}, kernels {result['kernels']}",
        ["", "tokens a call", "tokens a second", "µs a call", "times the demo"],
        cells,
    )
    _left_out(result)


def _decode_words(result: dict[str, Any]) -> None:
    cells = [
        [arm, f"{found['prefill_tokens_per_second']:,.1f}", f"{found['decode_tokens_per_second']:,.2f}",
         show_bytes(found["device_bytes"])]
        for arm, found in result["results"].items()
    ]  # fmt: skip
    title = f"{result['prompt_tokens']} tokens of prompt, {result['tokens']} written, {result['rounds']} rounds"
    ui.table(title, ["tables", "prefill tokens/s", "decode tokens/s", "read from the device"], cells)
    for name, found in result["ratios"].items():
        print(f"{name}: decode {found['decode']:.3f}, prefill {found['prefill']:.3f}")


def _left_out(result: dict[str, Any]) -> None:
    for name, why in result["left_out"].items():
        ui.say(f"left out: {name}: {why}")
