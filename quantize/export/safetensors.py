"""Back to the published layout: every tensor under its own name, dtype and shape, in the file where it was.

A shard of which the package holds every tensor gets its own header again, so that the file is the source's byte for
byte; another gets a header of what the package holds.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.atomic import MARK, atomic_folder
from engram.builders.checkpoint import TOKENIZER_FILES
from engram.builders.families.config import NAME as CONFIG
from engram.builders.families.family import FLOATS, Part, Table
from engram.builders.tensor_files import BITS, INDEX, Tensor, read_header
from engram.quantize.export.target import (
    Converted,
    ExportError,
    Place,
    TargetConfig,
    open_converted,
    rows_of,
    write_behind,
)
from engram.quantize.folder import check_target, copy_hashed
from engram.quantize.foreign_rows import ForeignRows
from engram.quantize.source_parts import DENSE, HEADER, SOURCE, tensor_blocks

_FACTOR = "weight_scale"  # of a table with one factor, beside its shards


@dataclass(frozen=True)
class Shard:
    """A file to write: its header, where each tensor begins, how long it is, and whether nothing is missing."""

    header: bytes
    places: Mapping[str, int]
    bytes: int
    whole: bool


def export(config: TargetConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write the checkpoint's memory as it was published; the fields of `engram export --json`.

    Raises ExportError for a package that does not hold the source's own rows, RowStoreError for a damaged one.
    """
    begin, progress = time.monotonic(), progress or Progress()
    check_target(config.source, config.out, force=config.force, error=ExportError)
    with open_converted(config.source) as held:
        if held.form != "safetensors":
            raise ExportError(
                f"{config.source} was converted from a {held.form}, which has no config.json and other tensor names",
                hint="convert the safetensors checkpoint, or export with --format gguf",
            )
        source = held.folder / SOURCE
        dense = read_header(source / DENSE) if held.dense else {}
        for layer in held.places:
            _check_codec(held, layer, dense)
        shards = _plan(held, dense)
        with atomic_folder(config.out, force=config.force, error=ExportError) as folder:
            for name, shard in shards.items():
                with (folder / name).open("wb") as file:
                    file.write(shard.header)
                    file.truncate(shard.bytes)
            for layer in held.places:
                _write_rows(held, layer, folder, shards, progress)
            for name, file_name in held.dense.items():
                _write_tensor(dense[name], folder / file_name, shards[file_name].places[name])
            copy_hashed(source / CONFIG, folder / CONFIG)
            for name in TOKENIZER_FILES:
                if (held.folder / name).is_file():
                    copy_hashed(held.folder / name, folder / name)
            if len(shards) > 1 or "model.safetensors" not in shards:
                _write_index(folder / INDEX, shards)
            sizes = [path.stat().st_size for path in folder.iterdir() if path.name != MARK]
    return {
        "format": "safetensors", "out": str(config.out), "files": len(sizes), "bytes": sum(sizes),
        "whole": sorted(name for name, shard in shards.items() if shard.whole),
        "partial": sorted(name for name, shard in shards.items() if not shard.whole),
        "seconds": time.monotonic() - begin,
    }  # fmt: skip


def _check_codec(held: Converted, layer: int, dense: Mapping[str, Tensor]) -> None:
    """Refuse rows that are no longer in the codec in which they were published."""
    table, places = held.tables[layer], held.places[layer]
    values, scales = ([p for p in places if (p.column > 0) == apart] for apart in (False, True))
    tensors = [Tensor(held.folder, p.dtype, p.shape, 0, p.rows * p.size) for p in (*values, *scales)]
    parts = tuple(
        Part(p.first_row, p.rows, tensors[i], tensors[len(values) + i] if scales else None)
        for i, p in enumerate(values)
    )
    factor = dense.get(values[0].name.removesuffix("weight").rpartition("shard_")[0] + _FACTOR)
    codec = FLOATS.get(values[0].dtype, "fp8-e8m0" if scales else "fp8-tensor")
    published = Table(layer, values[0].dtype, codec, table.rows, table.width, parts, (), factor)
    theirs = ForeignRows.of(published).codec.name
    if theirs != table.codec_name:
        raise held.refuse_codec(
            layer, f"{values[0].name} was {values[0].dtype}, which is {theirs!r}",
            "convert the checkpoint without --tables",
        )  # fmt: skip


def _plan(held: Converted, dense: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Every file to write, from the headers that the package keeps."""
    wanted: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for place in (place for places in held.places.values() for place in places):
        wanted.setdefault(place.file, {})[place.name] = place.dtype, place.shape
    for name, file in held.dense.items():
        if name not in dense:
            raise ExportError(f"{held.folder / SOURCE / DENSE} lacks {name!r}", hint="copy the package again")
        wanted.setdefault(file, {})[name] = dense[name].dtype, dense[name].shape
    return {file: _shard(held.folder / SOURCE, file, tensors) for file, tensors in sorted(wanted.items())}


def _shard(source: Path, file: str, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shard:
    path = source / (file + HEADER)
    if PurePosixPath(file).name != file or file in (".", ".."):
        raise ExportError(f"the package names the shard {file!r}, which is no plain file name")
    try:
        raw = path.read_bytes()
        entries = json.loads(raw[8:])
        metadata = entries.pop("__metadata__", None)
        spans = {name: (int(e["data_offsets"][0]), int(e["data_offsets"][1])) for name, e in entries.items()}
        found = {name: (e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise ExportError(f"{path} is no header of a shard: {wrong}", hint="copy the package again") from wrong
    for name, said in wanted.items():
        begin, end = spans.get(name, (0, 0))
        if found.get(name) != said or end - begin != math.prod(said[1]) * BITS[said[0]] // 8:
            raise ExportError(
                f"{path} says that {name!r} is {found.get(name)}, the package holds {said}",
                hint="convert the checkpoint again",
            )
    if len(wanted) == len(found):
        places = {name: len(raw) + begin for name, (begin, _) in spans.items()}
        return Shard(raw, places, len(raw) + max(end for _, end in spans.values()), whole=True)
    text: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    reached, begins = 0, {}
    for name in sorted(wanted, key=lambda name: spans[name]):
        begins[name], length = reached, spans[name][1] - spans[name][0]
        text[name] = {**entries[name], "data_offsets": [reached, reached + length]}
        reached += length
    words = json.dumps(text, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    header = len(words).to_bytes(8, "little") + words
    places = {name: len(header) + begin for name, begin in begins.items()}
    return Shard(header, places, len(header) + reached, whole=False)


def _write_rows(held: Converted, layer: int, folder: Path, shards: Mapping[str, Shard], progress: Progress) -> None:
    """A table's rows, its values and scales to the tensors that they came from."""
    parts = [[p for p in held.places[layer] if (p.column > 0) == apart] for apart in (False, True)]
    starts = [[place.first_row for place in places] for places in parts]
    for first, rows in rows_of(held.tables[layer], progress):
        for places, begins in zip(parts, starts, strict=True):
            for place in _touched(places, begins, first, first + len(rows)):
                low = max(first, place.first_row)
                high = min(first + len(rows), place.first_row + place.rows)
                block = rows[low - first : high - first, place.column : place.column + place.size]
                offset = shards[place.file].places[place.name] + (low - place.first_row) * place.size
                with (folder / place.file).open("r+b", buffering=0) as file:
                    write_behind(file, np.ascontiguousarray(block).data, offset)


def _touched(places: list[Place], starts: list[int], begin: int, end: int) -> Iterator[Place]:
    """Those that hold any of these rows."""
    for place in places[max(0, bisect_right(starts, begin) - 1) :]:
        if place.first_row >= end:
            return
        yield place


def _write_tensor(tensor: Tensor, path: Path, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        for block in tensor_blocks(tensor):
            write_behind(file, block, offset)
            offset += len(block)


def _write_index(path: Path, shards: Mapping[str, Shard]) -> None:
    """Which file holds which tensor, of those that are written."""
    weight_map = {name: file for file, shard in shards.items() for name in sorted(shard.places)}
    size = sum(shard.bytes - len(shard.header) for shard in shards.values())
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
