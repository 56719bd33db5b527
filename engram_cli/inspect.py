"""`engram inspect`: what a folder holds, from its headers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from engram.cli import options, ui
from engram.cli.sizes import show_bytes


def inspect(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PATH|NAME",
            help="A checkpoint or package of ours, a published checkpoint, or a GGUF; where no such path is, a hub name"
            " (ORG/NAME[@REVISION][/FILE.gguf]) or an https:// URL, read without a download.",
        ),
    ],
    json: options.Json = False,
) -> None:
    """Say what a checkpoint or package holds, from headers alone, and what its quality gate found."""
    from engram.cli.progress import on_screen
    from engram.quantize.inspect_any import inspect_any

    result = inspect_any(str(name), on_screen())
    if json:
        return ui.emit(result)
    rows = [
        [str(layer["layer"]), ",".join(map(str, layer["orders"])), str(layer["heads"]), f"{layer['rows']:,}",
         str(layer["width"]), layer["dtype"], f"{layer['bits_per_value']:.2f}", show_bytes(layer["bytes"])]
        for layer in result["layers"]
    ]  # fmt: skip
    columns = ["layer", "orders", "heads", "rows", "width", "stored as", "bits a value", "size"]
    verdict = ": rejected by its quality gate" if result["rejected"] else ""
    ui.table(f"{result['kind']}, {result['family']}{verdict}", columns, rows)
    words = [f"a token reads {result['rows_per_token']} rows, {show_bytes(result['bytes_per_token'])}"]
    words += [backbone_words(result["backbone"])] if "backbone" in result else other_words(result)
    if "plans" in result:
        words.append(plan_words(result["plans"]))
    if "quality" in result:
        words.append(quality_words(result["quality"]))
    print(ui.printable("\n".join(words)))


def other_words(result: dict[str, Any]) -> list[str]:
    """Of a published checkpoint: where its tables lie, and what else is there."""
    words = [f"tables in: {', '.join(result['table_files']) or 'no file that is here'}"]
    size = result["other"]["bytes"]
    words.append(f"besides: {result['other']['tensors']:,} tensors" + ("" if size is None else f", {show_bytes(size)}"))
    if "source" in result:
        words.append(f"read from headers: {result['source']}")
    if result["missing_files"]:
        words.append(f"not here: {', '.join(result['missing_files'])}")
    return words


def backbone_words(backbone: dict[str, Any]) -> str:
    """Type, size and place in a line."""
    if backbone["kind"] == "none":
        return "backbone: none, these are the tables of a published model alone"
    stored = backbone["type"] + ("" if backbone["type"] == backbone["dtype"] else f", computed in {backbone['dtype']}")
    size = f", {show_bytes(backbone['bytes'])}" if "bytes" in backbone else ", its files are not here"
    place = "in this folder" if backbone["kind"] == "embedded" else f"at {backbone['path']}"
    return f"backbone: {stored}{size}, {place}"


def plan_words(plans: dict[str, Any]) -> str:
    """What a calibration text chose: a line for each class of rows, and what that cost on documents not counted."""
    lines = ["rows by codec, as the calibration text reads them:"]
    for layer, plan in (_at(plans, "layers") or {}).items():
        classes = [part for part in _at(plan, "classes") or [] if part]
        rows = sum(part.get("rows") or 0 for part in classes)
        for part in classes:
            share = part["rows"] / rows if rows and part.get("rows") is not None else None
            size = "-" if part.get("bytes") is None else show_bytes(part["bytes"])
            rows_of = f"{_show(part, ',', 'rows')} rows ({_share(share)})"
            look_ups = f"{_share(part.get('look_up_share'))} of look-ups"
            if part.get("held_out_share") is not None:
                look_ups += f" ({_share(part['held_out_share'])} of those not counted)"
            lines.append(f"  layer {layer}, {part.get('codec') or 'dropped'}: {rows_of}, {size}, {look_ups}")
        if (first := _at(plan, "first_time_share")) is not None:
            lines.append(f"  layer {layer}: of new text about {_share(first)} of look-ups find a row not yet read")
    if held := _at(plans, "held_out"):
        ends = [_show(held, "+.6f", "ci95", end) for end in (0, 1)]
        lines.append(
            f"  on {_show(held, ',', 'tokens')} tokens of {_show(held, ',', 'documents')} documents that were not "
            f"counted the loss changes by {_show(held, '+.6f', 'change')} nats (95 % {ends[0]} to {ends[1]})"
        )
    if tried := _at(plans, "tried"):
        lines.append(f"  {len(tried)} plans were tried")
    return "\n".join(lines)


def quality_words(quality: dict[str, Any]) -> str:
    """The gate's report in a few lines; what it lacks is a dash, or left out."""
    lines = [
        f"quality, {_show(quality, ',', 'tokens')} tokens of {_show(quality, ',', 'documents')} documents, against the "
        "float model:",
        f"  loss {_show(quality, '.5f', 'loss', 'quantized')} nats, {_change(quality)}",
        f"  gain kept {_kept(quality)}",
        f"  KL mean {_show(quality, '.3g', 'kl', 'mean')}, 99th percentile {_show(quality, '.3g', 'kl', 'p99')} nats; "
        f"likeliest token the same: {_share(_at(quality, 'top1'))}",
        f"  controls: backbone alone {_show(quality, '.4f', 'loss', 'backbone')}, zero table "
        f"{_show(quality, '.4f', 'loss', 'zero_table')}, shuffled rows {_show(quality, '.4f', 'loss', 'shuffled_rows')}"
        f", float {_show(quality, '.5f', 'loss', 'float')}",
    ]
    if errors := _at(quality, "row_error"):
        each = (f"layer {layer} {_show(errors, '.3%', layer)}" for layer in errors)
        lines.append("  gate-weighted row error: " + ", ".join(each))
    if own := _at(quality, "continuations"):
        lines.append(
            f"  {_show(own, ',', 'texts')} fixed continuations: loss {_show(own, '+.6f', 'change', 'nll')}, KL "
            f"{_show(own, '.3g', 'kl', 'mean')}, the same token {_share(_at(own, 'top1'))}"
        )
    for part, figures in (_at(quality, "parts") or {}).items():
        lines.append(
            f"  of it {part}: loss {_show(figures, '+.6f', 'change', 'nll')}, KL {_show(figures, '.3g', 'kl', 'mean')}"
        )
    if shared := _at(quality, "documents_in_calibration"):
        lines.append(f"  {shared:,} of its documents are in the calibration text too: not unseen")
    if (bound := _at(quality, "max_loss")) is not None:
        verdict = "passed" if quality.get("passed") else "NOT PASSED"
        lines.append(
            f"  {verdict}: the loss grows by at most {_show(quality, '.6f', 'change', 'ci95', 1)} nats (95 %), "
            f"{_show(bound, '.6f', 'nats')} are allowed ({_at(bound, 'asked') or '-'})"
        )
    return "\n".join(lines)


def _at(value: Any, *names: str | int) -> Any:
    """A field of a field; None where there is none."""
    for name in names:
        if isinstance(name, int):
            value = None if value is None else value[name]
        else:
            value = (value or {}).get(name)
    return value


def _show(value: Any, form: str, *names: str | int) -> str:
    """A number of a report; a dash where there is none."""
    found = _at(value, *names)
    return "-" if found is None else format(found, form)


def _change(report: dict[str, Any]) -> str:
    ends = [_show(report, "+.6f", "change", "ci95", end) for end in (0, 1)]
    return f"{_show(report, '+.6f', 'change', 'nll')} (95 % {ends[0]} to {ends[1]})"


def _kept(report: dict[str, Any]) -> str:
    if "gain_kept" not in report:
        return "-"
    if (share := _at(report, "gain_kept", "share")) is None:
        return "-: on this text the float memory itself gains nothing that is sure"
    low, high = (_share(_at(report, "gain_kept", "ci95", end)) for end in (0, 1))
    return f"{_share(share)} (95 % {low} to {high})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
