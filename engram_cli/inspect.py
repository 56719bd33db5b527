"""`engram inspect`: what a folder holds, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli import options, ui
from engram.cli.sizes import show_bytes


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint (float or quantized) or a package.")],
    json: options.Json = False,
) -> None:
    """Say what a checkpoint or package holds, and what its quality gate found."""
    from engram.quantize.inspect import inspect as work

    result = work(path)
    if json:
        return ui.emit(result)
    rows = [
        [str(layer["layer"]), ",".join(map(str, layer["orders"])), str(layer["heads"]), f"{layer['rows']:,}",
         str(layer["width"]), layer["dtype"], f"{layer['bits_per_value']:.2f}", show_bytes(layer["bytes"])]
        for layer in result["layers"]
    ]  # fmt: skip
    columns = ["layer", "orders", "heads", "rows", "width", "stored as", "bits a value", "size"]
    ui.table(f"{result['kind']}, {result['family']}", columns, rows)
    print(
        f"a token reads {result['rows_per_token']} rows, {show_bytes(result['bytes_per_token'])}; "
        f"backbone: {ui.show('', result['backbone'])}"
    )
    if "quality" in result:
        print(quality_words(result["quality"]))


def quality_words(quality: dict[str, Any]) -> str:
    """The gate's report in a few lines."""
    change, kl = quality["change"], quality["kl"]
    loss = quality["loss"]
    low, high = change["ci95"]
    lines = [
        f"quality, {quality['tokens']:,} tokens of {quality['documents']} documents, against the float model:",
        f"  loss {loss['quantized']:.5f} nats, {change['nll']:+.6f} (95 % {low:+.6f} to {high:+.6f})",
        f"  gain kept {_kept(quality['gain_kept'])}",
        f"  KL mean {kl['mean']:.3g}, 99th percentile {kl['p99']:.3g} nats; likeliest token the same: "
        f"{_share(quality['top1'])}",
        f"  controls: backbone alone {loss['backbone']:.4f}, zero table {loss['zero_table']:.4f}, shuffled rows "
        f"{loss['shuffled_rows']:.4f}, float {loss['float']:.5f}",
        "  gate-weighted row error: " + ", ".join(f"layer {n} {e:.3%}" for n, e in quality["row_error"].items()),
    ]
    if "continuations" in quality:
        own = quality["continuations"]
        lines.append(
            f"  {own['texts']} fixed continuations: loss {own['change']['nll']:+.6f}, KL {own['kl']['mean']:.3g}, "
            f"the same token {_share(own['top1'])}"
        )
    for part, figures in quality.get("parts", {}).items():
        lines.append(f"  of it {part}: loss {figures['change']['nll']:+.6f}, KL {figures['kl']['mean']:.3g}")
    if "max_loss" in quality:
        bound = quality["max_loss"]
        verdict = "passed" if quality["passed"] else "NOT PASSED"
        lines.append(
            f"  {verdict}: the loss grows by at most {high:.6f} nats (95 %), {bound['nats']:.6f} are allowed "
            f"({bound['asked']})"
        )
    return "\n".join(lines)


def _kept(kept: dict[str, Any]) -> str:
    if kept["share"] is None:
        return "-: on this text the float memory itself gains nothing that is sure"
    return f"{_share(kept['share'])} (95 % {_share(kept['ci95'][0])} to {_share(kept['ci95'][1])})"


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"
