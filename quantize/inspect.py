"""What a checkpoint or package is, from its manifest and its files' headers alone. No torch, no table is read."""

from __future__ import annotations

import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram import EngramError
from engram.builders import checkpoint as checkpoints
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import MANIFEST, CheckpointError
from engram.builders.layout import Layout
from engram.kernels.codecs import find_codec
from engram.quantize import package as packages
from engram.quantize import tables as quantized
from engram.quantize.extents import is_map
from engram.quantize.folder import is_plain

KINDS = {
    checkpoints.FORMAT: "float checkpoint",
    quantized.FORMAT: "quantized checkpoint",
    packages.FORMAT: "package",
}


def inspect(folder: Path) -> dict[str, Any]:
    """The fields of `engram inspect --json`: kind, layers, what a token reads, the backbone, what the gate found.

    `quality` and `plans` are as recorded, their known fields of the right types, any of them missing. Raises
    CheckpointError where the folder is none of ours, or naming the file and the field where one is damaged.
    """
    versions = {checkpoints.FORMAT: checkpoints.VERSION, quantized.FORMAT: quantized.VERSION,
                packages.FORMAT: packages.VERSION}  # fmt: skip
    try:
        manifest = _Field(folder / MANIFEST, "", checkpoints.read_manifest(folder, versions))
    except RecursionError:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON: its parts are nested too deeply") from None
    layout = _layout(folder, manifest.at("layout"))
    tables = manifest.at("tables")
    layers = [_layer(folder, layout, layer, tables.at(str(layer))) for layer in layout.layers]
    result: dict[str, Any] = {
        "kind": KINDS[manifest.at("format").text()], "family": f"engram-{layout.dialect}", "layers": layers,
        "rows_per_token": layout.columns * len(layout.layers),
        "bytes_per_token": sum(layer["row_bytes"] * layout.columns for layer in layers),
        "table_bytes": sum(layer["bytes"] for layer in layers),
        "vocab_size": layout.vocab_size, "rejected": False,
    }  # fmt: skip
    result["backbone"] = _backbone(folder, manifest.at("backbone"), _noted(manifest, "backbone_quantized"))
    if result["backbone"]["kind"] == "none":
        result["family"] = result["backbone"]["path"]
    quality, plans = _noted(manifest, "quality"), _noted(manifest, "plans")
    if quality is not None:
        quality.check(_QUALITY)
        result |= {"quality": quality.value, "rejected": quality.value.get("passed") is False}
    if plans is not None:
        plans.check(_PLANS)
        result["plans"] = plans.value
    return result


def _noted(manifest: _Field, name: str) -> _Field | None:
    """What the making of an artifact left behind: in a package it is a part of `origin`."""
    origin = manifest.maybe("origin")
    return manifest.maybe(name) or (None if origin is None else origin.maybe(name))


def _layout(folder: Path, said: _Field) -> Layout:
    said.at("head_dim").count(1, 4096)
    for name in ("heads", "vocab_size"):
        said.at(name).count(1)
    said.at("dialect").text()
    for order in said.at("orders").parts():
        order.count(1)
    for layer in said.at("layers").parts():
        said.at("table_rows").at(str(layer.count())).count(1, 1 << 48)
    try:
        return Layout.load(folder)
    except EngramError as wrong:
        raise CheckpointError(f"{said.manifest}: {said.name}: {wrong}", hint=wrong.hint) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as wrong:
        raise CheckpointError(f"{said.manifest}: {said.name} has a field of the wrong type: {wrong}") from None


def _layer(folder: Path, layout: Layout, layer: int, entry: _Field) -> dict[str, Any]:
    width, rows = layout.head_dim, layout.table_rows[layer]
    for name, value in (("rows", rows), ("width", width)):
        if entry.at(name).count() != value:
            raise entry.at(name).wrong(f"{value} as the layout says")
    size = entry.file_bytes(folder)
    parts = None if (found := entry.maybe("parts")) is None else found.parts()
    if parts is None:
        row_bytes = float(entry.row_bytes(width))
        dtype = entry.at("codec").text()
    else:  # of a mixed table: the mean over its rows
        counts = [part.at("rows").count() for part in parts]
        if sum(counts) != rows:
            raise entry.at("parts").wrong(f"classes of {rows} rows together")
        codecs = [None if part.at("codec").value is None else part.at("codec").text() for part in parts]
        sizes = [part.row_bytes(width) for part, codec in zip(parts, codecs, strict=True) if codec is not None]
        stored = [count for count, codec in zip(counts, codecs, strict=True) if codec is not None]
        row_bytes = sum(map(int.__mul__, sizes, stored)) / rows
        size += sum(part.file_bytes(folder) for part in parts if part.at("file").value is not None)
        dtype = "+".join(codec or "dropped" for codec in codecs)
    elsewhere = is_map(entry.at("file").text())
    result: dict[str, Any] = {
        "layer": layer, "orders": list(layout.orders), "heads": layout.heads, "rows": rows, "width": width,
        "dtype": dtype, "bytes": size, "row_bytes": row_bytes,
        "bits_per_value": 8 * row_bytes / width if elsewhere else 8 * size / rows / width,
    }  # fmt: skip
    if parts is not None:
        result["classes"] = [{"codec": c, "rows": n} for c, n in zip(codecs, counts, strict=True)]
    return result


def _backbone(folder: Path, said: _Field, made: _Field | None) -> dict[str, Any]:
    """Kind, path, dtype, type (what its matrices are stored as) and, where all its files are here, their bytes."""
    for name in ("kind", "path", "dtype"):
        said.at(name).text()
    if "sha256" in said.keys():
        for name in said.at("sha256").keys():
            said.at("sha256").at(name).text()
    try:
        reference = BackboneRef.from_json(said.value)
    except EngramError as wrong:
        raise CheckpointError(f"{said.manifest}: {said.name}: {wrong}", hint=wrong.hint) from None
    files = reference.files(folder)
    sizes = [_size(path) for path in files.values()]
    if reference.kind == "embedded" and None in sizes:
        missing = list(files.values())[sizes.index(None)]
        raise CheckpointError(f"{missing} is missing, {said.manifest} names it in {said.name}.sha256")
    gguf = any(name.endswith(".gguf") for name in files)
    result: dict[str, Any] = {"kind": reference.kind, "path": reference.path, "dtype": reference.dtype}
    result["type"] = made.at("type").text() if made is not None else "gguf" if gguf else reference.dtype
    return result | ({"bytes": sum(map(int, filter(None, sizes)))} if sizes and None not in sizes else {})


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


@dataclass(frozen=True)
class _Field:
    """A field of a manifest: what is missing or of another kind is a CheckpointError with the file and its name."""

    manifest: Path
    name: str
    value: Any

    def wrong(self, rule: str) -> CheckpointError:
        """The error that says what it must be."""
        name = self.name or "the whole"
        return CheckpointError(f"{self.manifest}: {name} is {reprlib.repr(self.value)}, it must be {rule}")

    def keys(self) -> list[str]:
        """Of an object."""
        if not isinstance(self.value, Mapping):
            raise self.wrong("an object")
        return list(self.value)

    def at(self, key: str) -> _Field:
        """A field of an object."""
        name = f"{self.name}.{key}" if self.name else key
        if key not in self.keys():
            raise CheckpointError(f"{self.manifest} lacks the field {name}")
        return _Field(self.manifest, name, self.value[key])

    def maybe(self, key: str) -> _Field | None:
        """The same; None where it is missing or null."""
        return self.at(key) if key in self.keys() and self.value[key] is not None else None

    def parts(self) -> list[_Field]:
        """Of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [_Field(self.manifest, f"{self.name}[{i}]", part) for i, part in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return self.value

    def count(self, least: int = 0, most: int = 1 << 62) -> int:
        if type(self.value) is not int or not least <= self.value <= most:
            raise self.wrong(f"a whole number from {least} to {most}")
        return self.value

    def number(self) -> None:
        if type(self.value) not in (int, float) or abs(self.value) > 1e300 and type(self.value) is int:
            raise self.wrong("a number")

    def truth(self) -> None:
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")

    def interval(self) -> None:
        """Two numbers."""
        if len(self.parts()) != 2:
            raise self.wrong("two numbers")
        for part in self.parts():
            if part.value is not None:
                part.number()

    def check(self, shape: Any) -> None:
        """Compare every field that is there, and not null, with a shape: `*` stands for every name."""
        if isinstance(shape, list):
            for part in self.parts():
                part.check(shape[0])
        elif not isinstance(shape, dict):
            shape(self)
        else:
            for key in self.keys() if "*" in shape else shape:
                if (found := self.maybe(key)) is not None:
                    found.check(shape.get(key, shape.get("*")))

    def row_bytes(self, width: int) -> int:
        """Bytes of a row as the entry's codec stores it."""
        codec, version = self.at("codec"), self.maybe("codec_version")
        try:
            return find_codec(codec.text(), None if version is None else version.count()).row_bytes(width)
        except CheckpointError:
            raise
        except EngramError as wrong:
            raise CheckpointError(f"{codec.manifest}: {codec.name}: {wrong}", hint=wrong.hint) from None

    def file_bytes(self, folder: Path) -> int:
        """Bytes of the entry's file, which is there and as large as the entry says."""
        name = self.at("file")
        path = folder / name.text()
        found = _size(path) if is_plain(name.text()) else None
        if found is None:
            raise CheckpointError(f"{path} is missing, {self.manifest} names it in {name.name}")
        if (said := self.maybe("bytes")) is not None and said.count() != found:
            raise said.wrong(f"{found}, the size of {path}")
        return found


_CHANGE = {"nll": _Field.number, "ci95": _Field.interval}
_FIGURES = {
    "change": _CHANGE, "gain_kept": {"share": _Field.number, "ci95": _Field.interval}, "top1": _Field.number,
    "kl": {"mean": _Field.number, "p99": _Field.number},
}  # fmt: skip
_QUALITY = _FIGURES | {
    "tokens": _Field.count, "documents": _Field.count, "documents_in_calibration": _Field.count,
    "passed": _Field.truth, "loss": {"*": _Field.number},
    "row_error": {"*": _Field.number}, "parts": {"*": _FIGURES},
    "max_loss": {"asked": _Field.text, "nats": _Field.number},
    "continuations": _FIGURES | {"texts": _Field.count, "loss": _Field.number},
}  # fmt: skip
_CLASS = {
    "codec": _Field.text, "rows": _Field.count, "bytes": _Field.count, "look_up_share": _Field.number,
    "held_out_share": _Field.number,
}  # fmt: skip
_PLANS = {
    "layers": {"*": {"classes": [_CLASS], "first_time_share": _Field.number}},
    "held_out": {"change": _Field.number, "ci95": _Field.interval, "tokens": _Field.count, "documents": _Field.count},
    "tried": [{"table_bytes": _Field.count}],
}  # fmt: skip
