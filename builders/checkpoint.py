"""Float checkpoints: save and load; the only place that knows our tensor and file names. No torch.

A checkpoint is a folder:

    engram.json               manifest: format, version, layout, gates, backbone reference, tables, SHA-256 values
    token_map.safetensors     I64 [vocab]                          (absent where raw ids are hashed)
    tokenizer.json, tokenizer_info.json                            (as build-vocab wrote them)
    layers.safetensors        `layers.{l}.{parameter}` F32         (dense weights of the gates)
    tables/layer-NN.safetensors  one tensor `rows` F32 [rows, width]
    backbone/                 only where the backbone itself was trained
    state/                    only where training can go on from here
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.builders.atomic import MARK, atomic_folder
from engram.builders.backbone import BackboneRef
from engram.builders.layout import Layout

FORMAT = "engram-checkpoint"
VERSION = 1
MANIFEST = "engram.json"
DENSE = "layers.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_info.json")
_HEADER_ALIGN = 4096  # table rows begin on a page, so that a mapped row block is a plain read
_BLOCK_ROWS = 1 << 16


class CheckpointError(EngramError):
    """A checkpoint that is missing, damaged or of another version."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: small files read and checked, tables mapped when asked for."""

    folder: Path
    manifest: dict[str, Any]
    layout: Layout
    backbone: BackboneRef

    def gates(self) -> dict[int, dict[str, Any]]:
        """Gate configuration (as JSON) of every layer."""
        return {int(layer): dict(config) for layer, config in self.manifest["gate"].items()}

    def dense(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """Dense weights of every layer's gate, by parameter name."""
        return split_dense(self.folder / DENSE)

    def table(self, layer: int) -> NDArray[np.float32]:
        """The layer's rows, mapped read-only: float32 [rows, width]."""
        return map_table(self.folder / table_file(layer), self.layout.table_rows[layer], self.layout.head_dim)


def table_file(layer: int) -> str:
    """Path of a layer's table inside a checkpoint or package."""
    return f"tables/layer-{layer:02d}.safetensors"


def save_checkpoint(
    out: Path,
    *,
    layout: Layout,
    gates: Mapping[int, Mapping[str, Any]],
    dense: Mapping[int, Mapping[str, NDArray[np.float32]]],
    tables: Mapping[int, NDArray[np.float32]],
    backbone: BackboneRef,
    tokenizer_folder: Path,
    extra: Mapping[str, Any] | None = None,
    state: Mapping[str, bytes] | None = None,
    backbone_folder: Path | None = None,
    force: bool = False,
) -> None:
    """Write a checkpoint; nothing appears under `out` before all of it is on the disk.

    `tables` may be memory maps: they are written row block by row block. `extra` goes into the manifest, `state` into
    files of the folder `state/`. `backbone_folder` is copied to `backbone/`, for `backbone.kind` "embedded".
    """
    with atomic_folder(out, force=force, error=CheckpointError) as folder:
        (folder / "tables").mkdir()
        for layer in layout.layers:
            write_table(folder / table_file(layer), tables[layer])
        write_dense(folder / DENSE, dense)
        layout.save_map(folder)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        if backbone_folder is not None:
            shutil.copytree(backbone_folder, folder / "backbone")
        for name, content in (state or {}).items():
            (folder / "state").mkdir(exist_ok=True)
            (folder / "state" / name).write_bytes(content)
        small = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MARK)
        manifest = {
            "format": FORMAT, "version": VERSION, "layout": layout.to_json(),
            "gate": {str(layer): dict(config) for layer, config in gates.items()},
            "backbone": backbone.to_json(),
            "tables": {
                str(layer): {
                    "file": table_file(layer), "codec": "f32", "rows": layout.table_rows[layer],
                    "width": layout.head_dim,
                }
                for layer in layout.layers
            },
            "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in small},
            **(extra or {}),
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's manifest and small files; table headers and sizes too, table contents not."""
    manifest = read_manifest(folder, {FORMAT: VERSION})
    check_small_files(folder, manifest)
    layout = Layout.load(folder)
    checkpoint = Checkpoint(folder, manifest, layout, BackboneRef.from_json(manifest["backbone"]))
    for layer in layout.layers:
        checkpoint.table(layer)
    return checkpoint


def read_manifest(folder: Path, versions: Mapping[str, int]) -> dict[str, Any]:
    """The parsed engram.json of one of these formats, each with its version; CheckpointError for anything else."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except OSError:
        if not folder.exists():
            raise CheckpointError(f"{folder} does not exist") from None
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}", hint="is this an engram checkpoint or package?"
        ) from None
    except (ValueError, RecursionError) as wrong:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON: {wrong}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(found, str) or found not in versions:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {found!r}, expected {' or '.join(map(repr, versions))}",
            hint="this needs the float checkpoint that it was made of" if list(versions) == [FORMAT] else "",
        )
    if manifest.get("version") != versions[found]:
        raise CheckpointError(
            f"{folder / MANIFEST} has version {manifest.get('version')!r}, this release reads {versions[found]}",
            hint="use the release that wrote it, or write it again",
        )
    missing = {"layout", "gate", "backbone", "tables", "sha256"} - manifest.keys()
    if missing:
        raise CheckpointError(f"{folder / MANIFEST} lacks the field {sorted(missing)[0]!r}")
    return dict(manifest)


def check_small_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder in which a file that the manifest hashes is missing or altered."""
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, the manifest names it")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise CheckpointError(f"{path} has SHA-256 {found}, the manifest says {expected}", hint="it was altered")


def write_table(path: Path, rows_ND: NDArray[np.float32]) -> None:
    """A safetensors file of one tensor `rows`, F32 [N, D], whose data begins on a 4 KiB boundary."""
    count, width = rows_ND.shape
    header = {"rows": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, count * width * 4]}}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, count, _BLOCK_ROWS):
            file.write(np.ascontiguousarray(rows_ND[begin : begin + _BLOCK_ROWS], dtype="<f4").data)


def map_table(path: Path, rows: int, width: int) -> NDArray[np.float32]:
    """Map a file that `write_table` wrote; CheckpointError where it is missing, truncated or of another shape."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 1 << 20)))
            size = file.seek(0, os.SEEK_END)
        entry = header["rows"]
        shape, dtype = list(entry["shape"]), entry["dtype"]
    except OSError:
        raise CheckpointError(f"table {path} is missing or unreadable") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"table {path} has no readable header for a tensor 'rows'") from None
    if dtype != "F32" or shape != [rows, width]:
        raise CheckpointError(f"table {path} holds {dtype} {shape}, the layout needs F32 {[rows, width]}")
    if size != 8 + length + rows * width * 4:
        raise CheckpointError(f"table {path} has {size} bytes, {8 + length + rows * width * 4} expected: truncated?")
    return np.memmap(path, dtype="<f4", mode="r", offset=8 + length, shape=(rows, width))


def write_dense(path: Path, dense: Mapping[int, Mapping[str, NDArray[np.float32]]]) -> None:
    """`layers.{l}.{parameter}` tensors, float32."""
    from safetensors.numpy import save_file

    flat = {
        f"layers.{layer}.{name}": np.ascontiguousarray(value, dtype=np.float32)
        for layer, values in dense.items()
        for name, value in values.items()
    }
    save_file(flat, path)


def split_dense(path: Path) -> dict[int, dict[str, NDArray[np.float32]]]:
    """The inverse of `write_dense`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    out: dict[int, dict[str, NDArray[np.float32]]] = {}
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as wrong:
        raise CheckpointError(f"{path} cannot be read: {wrong}") from None
    for key, value in tensors.items():
        parts = key.split(".", 2)
        if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit():
            raise CheckpointError(f"{path} holds a tensor {key!r}, expected names like 'layers.1.key_proj.weight'")
        out.setdefault(int(parts[1]), {})[parts[2]] = value
    return out
