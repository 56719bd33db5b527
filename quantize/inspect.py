"""What a checkpoint or package is, from its manifest and its files' headers alone. No torch, no table is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram.builders import checkpoint as checkpoints
from engram.builders.layout import Layout
from engram.kernels.codecs import find_codec
from engram.quantize import package as packages
from engram.quantize import tables as quantized
from engram.quantize.entries import entry_bytes

KINDS = {
    checkpoints.FORMAT: "float checkpoint",
    quantized.FORMAT: "quantized checkpoint",
    packages.FORMAT: "package",
}


def inspect(folder: Path) -> dict[str, Any]:
    """The fields of `engram inspect --json`: kind, layers, what a token reads, and the verdict of the quality gate.

    Raises CheckpointError where the folder is none of ours or its manifest is damaged.
    """
    versions = {checkpoints.FORMAT: checkpoints.VERSION, quantized.FORMAT: quantized.VERSION,
                packages.FORMAT: packages.VERSION}  # fmt: skip
    manifest = checkpoints.read_manifest(folder, versions)
    layout = Layout.load(folder)
    layers = [_layer(folder, layout, layer, manifest["tables"][str(layer)]) for layer in layout.layers]
    quality = manifest.get("quality", manifest.get("origin", {}).get("quality"))
    result: dict[str, Any] = {
        "kind": KINDS[manifest["format"]], "family": f"engram-{layout.dialect}", "layers": layers,
        "rows_per_token": layout.columns * len(layout.layers),
        "bytes_per_token": sum(layer["row_bytes"] * layout.columns for layer in layers),
        "table_bytes": sum(layer["bytes"] for layer in layers),
        "vocab_size": layout.vocab_size, "backbone": _backbone(manifest["backbone"]),
    }  # fmt: skip
    return result if quality is None else result | {"quality": quality}


def _layer(folder: Path, layout: Layout, layer: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    width, rows = layout.head_dim, layout.table_rows[layer]
    parts = entry.get("parts")
    if parts is None:
        size = entry.get("bytes") or (folder / entry["file"]).stat().st_size
        row_bytes = float(find_codec(entry["codec"]).row_bytes(width))
        dtype = entry["codec"]
    else:  # of a mixed table: the mean over its rows
        size = entry_bytes(dict(entry))
        sizes = [find_codec(p["codec"]).row_bytes(width) * p["rows"] for p in parts if p["codec"] is not None]
        row_bytes = sum(sizes) / rows
        dtype = "+".join(p["codec"] or "dropped" for p in parts)
    found: dict[str, Any] = {
        "layer": layer, "orders": list(layout.orders), "heads": layout.heads, "rows": rows, "width": width,
        "dtype": dtype, "bytes": size, "row_bytes": row_bytes, "bits_per_value": 8 * size / rows / width,
    }  # fmt: skip
    if parts is not None:
        found["classes"] = [{"codec": p["codec"], "rows": p["rows"]} for p in parts]
    return found


def _backbone(reference: Mapping[str, Any]) -> dict[str, Any]:
    return {name: reference[name] for name in ("kind", "path", "dtype", "quantized") if reference.get(name) is not None}
