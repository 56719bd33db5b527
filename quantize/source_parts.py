"""What a converted package keeps of its source besides the rows: the rest of the memory, byte for byte, and its names.

In `source/`: config.json as it was; dense.safetensors with the gates, projections and stored constants under their own
names; and `HEADER` files, the headers of the shards that hold any of it, by which a shard can be written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram.builders.families.config import NAME as CONFIG
from engram.builders.families.config import OWN_NAME
from engram.builders.families.family import Published
from engram.builders.tensor_files import Tensor, TensorFiles

SOURCE = "source"
DENSE = "dense.safetensors"
HEADER = ".header"
_BLOCK = 1 << 22


def describe_source(source: Path, found: Published, files: TensorFiles) -> dict[str, Any]:
    """Which tensors hold the rows of each table, in the order of rows, and where the rest of the memory was.

    {"form": "safetensors" or "gguf", "tables": {layer: [{"name", "file", "dtype", "shape", "rows", "part"}]}, "dense":
    {name: file}}; "part" is 0 for values and 1 for scales.
    """
    names = {tensor: name for name, tensor in files.tensors.items()}
    tables = {}
    for table in found.tables:
        held = [(part, 0, part.values) for part in table.parts]
        held += [(part, 1, part.scales) for part in table.parts if part.scales is not None]
        tables[str(table.layer)] = [
            {"name": names[tensor], "file": _name(source, tensor), "dtype": tensor.dtype, "shape": list(tensor.shape),
             "rows": part.rows, "part": number} for part, number, tensor in held
        ]  # fmt: skip
    dense = {names[tensor]: _name(source, tensor) for tensor in dense_tensors(found)}
    form = "gguf" if source.suffix == ".gguf" else "safetensors"
    return {"form": form, "tables": tables, "dense": dense}


def dense_tensors(found: Published) -> list[Tensor]:
    """Every tensor of the memory that holds no rows, in a fixed order."""
    own = [tensor for layer in found.dense.values() for tensor in layer.values()]
    factors = [table.factor for table in found.tables if table.factor is not None]
    return sorted({*own, *found.stored.values(), *factors}, key=lambda tensor: (str(tensor.file), tensor.offset))


def keep_source(source: Path, folder: Path, found: Published, files: TensorFiles) -> list[str]:
    """Write `source/`; its files, relative to the package. Of a GGUF nothing is kept: its keys are in the layout."""
    if source.suffix == ".gguf":
        return []
    folder.mkdir(exist_ok=True)
    place = source if source.is_dir() else source.parent
    for name in (CONFIG, OWN_NAME):
        if (place / name).is_file():
            (folder / name).write_bytes((place / name).read_bytes())
    tensors = dense_tensors(found)
    names = {tensor: name for name, tensor in files.tensors.items()}
    if tensors:
        _write(folder / DENSE, {names[tensor]: tensor for tensor in tensors})
    shards = {tensor.file for tensor in tensors} | {file for table in found.tables for file in table.files}
    for shard in sorted(shards):
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            (folder / (shard.name + HEADER)).write_bytes(file.read(8 + length))
    return sorted(f"{SOURCE}/{path.name}" for path in folder.iterdir())


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of tensors copied from others, streamed."""
    entries, reached = {}, 0
    for name, tensor in tensors.items():
        end = reached + tensor.bytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for block in tensor_blocks(tensor):
                out.write(block)
        out.flush()
        os.fsync(out.fileno())


def tensor_blocks(tensor: Tensor) -> Iterator[bytes]:
    """A tensor's bytes, some MiB at a time."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.bytes
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise OSError(f"{tensor.file} ended within a tensor")
            left -= len(block)
            yield block


def _name(source: Path, tensor: Tensor) -> str:
    return tensor.file.relative_to(source).as_posix() if source.is_dir() else tensor.file.name
