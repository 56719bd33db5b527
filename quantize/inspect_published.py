"""What a published checkpoint holds, from config.json and headers alone: the fields of `engram inspect --json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engram import Progress
from engram.builders.families.family import Published, Table
from engram.builders.families.known import find_published, find_published_remote
from engram.builders.remote_files import find_remote
from engram.builders.tensor_files import TensorFiles


def inspect_published(path: Path) -> dict[str, Any]:
    """Family, tables, what a token reads, which files hold tables, and what else is there.

    Raises FamilyError for what is of no known family or contradicts it, TensorFileError and GgufHeaderError for headers
    that lie.
    """
    return _told(path, *find_published(path))


def inspect_remote(name: str, progress: Progress = Progress()) -> dict[str, Any]:
    """The same of a hub name or a URL, and `source`: that name with the commit, or the URL without its query.

    Bytes of tensors besides the tables are what the index says, None where it says nothing. Raises RemoteError too.
    """
    remote = find_remote(name, progress)
    return {**_told(remote.path, *find_published_remote(remote)), "source": remote.source}


def _told(path: Path, found: Published, files: TensorFiles) -> dict[str, Any]:
    layers = [_layer(path, found, table) for table in found.tables]
    tables = {file for table in found.tables for file in table.files}
    own = {part.values for table in found.tables for part in table.parts}
    own |= {part.scales for table in found.tables for part in table.parts if part.scales is not None}
    size, total = sum(tensor.bytes for tensor in own), files.total_bytes
    other: dict[str, int | None] = {"tensors": len(files.tensors) - len(own), "bytes": None}
    if total is not None and total >= size:
        other["bytes"] = total - size
    return {
        "kind": "published checkpoint", "family": found.family, "layers": layers,
        "rows_per_token": found.columns * len(layers),
        "bytes_per_token": sum(layer["row_bytes"] * found.columns for layer in layers),
        "table_bytes": sum(layer["bytes"] for layer in layers), "vocab_size": found.vocab_size or None,
        "compressed_size": found.compressed_size, "table_files": sorted(_name(path, file) for file in tables),
        "other": other, "missing_files": sorted(set(files.absent.values())), "rejected": False,
    }  # fmt: skip


def _layer(path: Path, found: Published, table: Table) -> dict[str, Any]:
    size = table.row_bytes * table.rows
    return {
        "layer": table.layer, "orders": list(found.orders), "heads": found.heads, "rows": table.rows,
        "width": table.width, "dtype": table.dtype, "codec": table.codec, "bytes": round(size),
        "row_bytes": table.row_bytes, "bits_per_value": 8 * table.row_bytes / table.width, "parts": len(table.parts),
        "files": [_name(path, file) for file in table.files], "missing_files": list(table.absent),
    }  # fmt: skip


def _name(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix() if path.is_dir() else file.name
