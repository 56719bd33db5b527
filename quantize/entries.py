"""What a manifest says of a table: its files, its size, and whether the table that is there is the one meant.

FORMAT.md section 3.1 specifies the fields.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from engram.builders.checkpoint import MANIFEST
from engram.kernels.codecs import find_codec
from engram.quantize.extent_table import ExtentTable
from engram.quantize.extents import is_map
from engram.quantize.folder import is_plain
from engram.quantize.mapped import MappedTable
from engram.quantize.mixed_file import CODEC, CODEC_VERSION, is_mixed
from engram.quantize.mixed_table import MixedTable
from engram.quantize.row_store import RowStoreError
from engram.quantize.row_table import RowTable

_PART_FIELDS = {"class", "codec", "codec_version", "rows", "file", "bytes", "sha256", "seal"}


def written_files(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What the entry says of each of the table's files: `file`, `bytes`, `sha256`."""
    return [entry, *(part for part in entry.get("parts", []) if part["file"] is not None)]


def entry_hashes(entry: dict[str, Any]) -> dict[str, str]:
    """The table's files in the folder, and the SHA-256 of each."""
    return {item["file"]: item["sha256"] for item in written_files(entry)}


def entry_bytes(entry: dict[str, Any]) -> int:
    """Bytes of all the table's files."""
    return sum(int(item["bytes"]) for item in written_files(entry))


def open_table(path: Path, **expected: Any) -> RowTable:
    """A table file or, where the name ends as one's does, an extent map or a class map; as MappedTable.open."""
    if is_mixed(path.name):
        return MixedTable.open(path, **expected)
    return ExtentTable.open(path, **expected) if is_map(path.name) else MappedTable.open(path, **expected)


def open_entry(
    folder: Path, entry: dict[str, Any], *, layer: int, rows: int, width: int, verify: str, io: str = "auto"
) -> RowTable:
    """The table of an entry, after comparing the entry with what the layout wants and the table with the entry.

    Raises RowStoreError or CodecError for a table that is another one or damaged; KeyError, TypeError or AttributeError
    for an entry that lacks a field or has one of another type.
    """
    for name, value in (("rows", rows), ("width", width)):
        if entry[name] != value:
            raise RowStoreError(f"{folder / MANIFEST} has a table of {entry[name]} {name} for layer {layer}, "
                                f"its layout has {value}")  # fmt: skip
    if entry["codec"] != CODEC:
        find_codec(entry["codec"], entry["codec_version"])
    elif entry["codec_version"] != CODEC_VERSION:
        raise RowStoreError(
            f"{folder / MANIFEST} has a mixed table of version {entry['codec_version']!r} for layer {layer}, this "
            f"release reads {CODEC_VERSION}"
        )
    if not is_plain(entry["file"]):
        raise RowStoreError(f"{folder / MANIFEST} names a file {entry['file']!r}, which may lie outside the package")
    table = open_table(
        folder / entry["file"], codec=entry["codec"], rows=rows, width=width, layer=layer, verify=verify, io=io
    )
    try:
        if table.seal() != entry["seal"]:
            raise RowStoreError(
                f"table file {folder / entry['file']} is whole, but not the one that the manifest describes",
                hint="it comes from another export: copy the package again",
            )
        _check_parts(folder / MANIFEST, entry, table.part_entries(), layer)
    except BaseException:
        table.close()
        raise
    return table


def _check_parts(manifest: Path, entry: dict[str, Any], found: list[dict[str, Any]], layer: int) -> None:
    """Refuse parts other than the table has. What only the whole file tells (`sha256`) is left to verify."""
    said: list[dict[str, Any]] = entry.get("parts", [])
    if ("parts" in entry) != bool(found):
        raise RowStoreError(f"{manifest} has {len(said)} parts for layer {layer}, its table has {len(found)}")
    numbers = [part["class"] for part in said]
    wanted = [part["class"] for part in found]
    if numbers != wanted:
        raise RowStoreError(f"{manifest} has the classes {numbers} for layer {layer}, its table has {wanted}")
    for part, real in zip(said, found, strict=True):
        if part.keys() != _PART_FIELDS:
            raise RowStoreError(f"{manifest} has the fields {sorted(part)} for class {part['class']} of layer {layer}, "
                                f"there must be {sorted(_PART_FIELDS)}")  # fmt: skip
        if real["file"] is not None:
            real["file"] = PurePosixPath(entry["file"]).with_name(real["file"]).as_posix()
        for name, value in real.items():
            if part[name] != value:
                raise RowStoreError(
                    f"{manifest} has {name} {part[name]!r} for class {part['class']} of layer {layer}, its table "
                    f"has {value!r}",
                    hint="the manifest was altered, or the table comes from another export",
                )
        if (part["file"] is None) != (part["sha256"] is None):
            raise RowStoreError(f"{manifest} has sha256 {part['sha256']!r} for class {part['class']} of layer {layer}")
