"""The package: the folder that a laptop maps. Write, open, verify; FORMAT.md section 3 specifies it. No torch."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress, __version__
from engram.builders import checkpoint as checkpoints
from engram.builders.atomic import MARK, atomic_folder, write_whole
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import DENSE, MANIFEST, TOKENIZER_FILES, table_file
from engram.builders.fetch import hash_file
from engram.builders.layout import Layout
from engram.kernels.codecs import find_codec
from engram.quantize import tables as quantized
from engram.quantize.attach import attach
from engram.quantize.entries import entry_bytes, entry_hashes, open_entry
from engram.quantize.folder import check_target, copy_hashed, is_plain
from engram.quantize.row_store import write_table
from engram.quantize.row_table import RowTable

FORMAT = "engram-package"
VERSION = 2
TOKEN_MAP = "token_map.safetensors"
_FIELDS = {
    "format",
    "version",
    "manifest_seal",
    "engram",
    "origin",
    "layout",
    "gate",
    "backbone",
    "tables",
    "sha256",
    "bytes",
}
_SEAL = re.compile(rb'"manifest_seal": "([0-9a-f]{64})"')
_UNSEALED = b"0" * 64
_LARGE = ("backbone/", "source/")  # files of these folders may be large:
_SMALL = 1 << 20  # beyond this they are hashed by verify, not at every open


class PackageError(EngramError):
    """A package that cannot be written, or one that is damaged, mislabelled or of another version."""


@dataclass(frozen=True)
class ExportConfig:
    """What becomes a package, and where."""

    source: Path
    out: Path
    embed_backbone: bool = True
    force: bool = False
    backbone: Path | None = None  # a GGUF in the place of the source's backbone


@dataclass(frozen=True)
class Package:
    """An opened package: small files checked, tables mapped (`layers`, by layer)."""

    folder: Path
    manifest: dict[str, Any]
    layout: Layout
    layers: dict[int, RowTable]

    @property
    def backbone(self) -> BackboneRef:
        """Where the backbone is; an embedded one lies in `folder`."""
        return BackboneRef.from_json(self.manifest["backbone"])

    def gates(self) -> dict[int, dict[str, Any]]:
        """Gate configuration (as JSON) of every layer."""
        return {int(layer): dict(config) for layer, config in self.manifest["gate"].items()}

    def dense(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """Dense weights of every layer's gate, by parameter name."""
        return checkpoints.split_dense(self.folder / DENSE)

    def close(self) -> None:
        """Unmap the tables."""
        for table in self.layers.values():
            table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Writing


def export_package(config: ExportConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write a package from a float checkpoint, a quantized one, or another package.

    Returns the fields of `engram export --json`. Nothing appears under `out` before all of it is on the disk. Raises
    PackageError or CheckpointError for a source that is damaged, BackboneError for a backbone that is, AttachError for
    one that does not fit.
    """
    begin = time.monotonic()
    progress = progress or Progress()
    check_target(config.source, config.out, force=config.force, error=PackageError)
    with open_source(config.source) as (manifest, layout, layers):
        reference = BackboneRef.from_json(manifest["backbone"])
        if config.backbone is not None:
            with progress.task(f"compare {config.backbone.name}"):
                reference = attach(config.backbone, config.source, manifest, layout)
        if _refused(manifest) or _refused(manifest.get("origin")):
            raise PackageError(
                f"{config.source} did not pass its quality gate",
                hint="see engram inspect; quantize with finer codecs or a larger --max-loss",
            )
        with atomic_folder(config.out, force=config.force, error=PackageError) as folder:
            (folder / "tables").mkdir()
            written = {
                str(layer): _write_table(config.source, layer, layout, layers, folder, progress)
                for layer in layout.layers
            }
            small = {}
            names = (DENSE, *TOKENIZER_FILES, *([TOKEN_MAP] if layout.token_map is not None else []))
            tables_only = manifest["backbone"]["kind"] == "none"
            for name in manifest["sha256"] if tables_only else names:
                if (config.source / name).is_file():
                    small[name] = copy_hashed(config.source / name, folder / name)
                elif name != TOKENIZER_FILES[1]:
                    raise PackageError(f"{config.source} holds no {name}, which a package needs")
                if name in manifest["sha256"] and manifest["sha256"][name] != small[name]:
                    raise PackageError(f"{config.source / name} changed while it was copied")
            place = _embed if config.embed_backbone else _refer
            backbone = reference if tables_only else place(reference, config.source, folder, progress)
            sizes = file_sizes(folder)
            origin = manifest.get("origin", {}) | {k: v for k, v in manifest.items() if k not in _FIELDS}
            write_manifest(
                folder, origin=origin, layout=layout, gate=manifest["gate"], backbone=backbone, tables=written,
                sha256=small, sizes=sizes,
            )  # fmt: skip
            size = (folder / MANIFEST).stat().st_size
    return {
        "out": str(config.out), "files": len(sizes) + 1, "bytes": sum(sizes.values()) + size,
        "tables": {n: {"codec": t["codec"], "rows": t["rows"], "bytes": entry_bytes(t)} for n, t in written.items()},
        "backbone": backbone.kind, "seconds": time.monotonic() - begin,
    }  # fmt: skip


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file below a folder that is being written, but its mark, and its size."""
    files = [path for path in _files(folder) if path != folder / MARK]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def write_manifest(
    folder: Path,
    *,
    origin: Mapping[str, Any],
    layout: Layout,
    gate: Mapping[str, Any],
    backbone: BackboneRef,
    tables: Mapping[str, Any],
    sha256: Mapping[str, str],
    sizes: Mapping[str, int],
) -> None:
    """Write and seal engram.json, the last file of a package (FORMAT.md 3.1)."""
    content = {
        "format": FORMAT, "version": VERSION, "manifest_seal": _UNSEALED.decode(), "engram": __version__,
        "origin": dict(origin), "layout": layout.to_json(), "gate": dict(gate), "backbone": backbone.to_json(),
        "tables": dict(tables), "sha256": dict(sha256), "bytes": dict(sizes),
    }  # fmt: skip
    data = (json.dumps(content, indent=1) + "\n").encode()
    write_whole(folder / MANIFEST, data.replace(_UNSEALED, hashlib.sha256(data).hexdigest().encode(), 1))


def _refused(manifest: Any) -> bool:
    """Whether the quality gate's report in a manifest, or in a package's `origin`, says that it did not pass."""
    quality = manifest.get("quality") if isinstance(manifest, dict) else None
    return isinstance(quality, dict) and quality.get("passed", True) is not True


@contextmanager
def open_source(folder: Path) -> Iterator[tuple[dict[str, Any], Layout, dict[int, RowTable] | None]]:
    """Manifest, layout and mapped tables of a float checkpoint (None: not mapped), a quantized one or a package.

    Raises CheckpointError or PackageError for anything else, and for damage.
    """
    versions = {checkpoints.FORMAT: checkpoints.VERSION, quantized.FORMAT: quantized.VERSION, FORMAT: VERSION}
    manifest = checkpoints.read_manifest(folder, versions)
    if manifest["format"] == checkpoints.FORMAT:
        opened = checkpoints.open_checkpoint(folder)
        yield opened.manifest, opened.layout, None
        return
    if manifest["format"] == quantized.FORMAT:
        with as_package_errors(folder):
            checkpoints.check_small_files(folder, manifest)
            layout = Layout.load(folder)
            package = Package(folder, manifest, layout, open_tables(folder, manifest, layout, "first-touch"))
    else:
        package = open_package(folder)
    with package:
        yield package.manifest, package.layout, package.layers


def _write_table(
    source: Path, layer: int, layout: Layout, layers: dict[int, RowTable] | None, folder: Path, progress: Progress
) -> dict[str, Any]:
    """A float table as codec f32, or a table copied after its checksums were compared; its entry of the manifest."""
    if layers is not None:
        return layers[layer].copy(folder, progress)
    made = write_table(
        folder / table_file(layer), quantized.float_blocks(checkpoints.open_checkpoint(source), layer),
        rows=layout.table_rows[layer], width=layout.head_dim, codec=find_codec("f32"), layer=layer, progress=progress,
    )  # fmt: skip
    return {"file": table_file(layer), **asdict(made)}


def _embed(reference: BackboneRef, source: Path, folder: Path, progress: Progress) -> BackboneRef:
    """Copy the backbone's files into `backbone/`, each compared with the hash that the reference states."""
    if reference.kind == "hf" and not Path(reference.path).is_dir():
        reference = replace(reference, path=_cached(reference.path))
    if not reference.sha256:
        reference = BackboneRef.find(reference.path, reference.dtype)
    hashes = {}
    for name, path in reference.files(source).items():
        if not path.is_file():
            raise PackageError(f"backbone file {path} is missing", hint="the checkpoint refers to a file that moved")
        target = "model.gguf" if path.suffix == ".gguf" else name
        hashes[target] = copy_hashed(path, folder / "backbone" / target, progress)
        if hashes[target] != reference.sha256[name]:
            raise PackageError(
                f"backbone file {path} has SHA-256 {hashes[target]}, the checkpoint names {reference.sha256[name]}",
                hint="the memory was trained for another backbone than this file; restore it or train again",
            )
    return BackboneRef("embedded", "backbone", reference.dtype, hashes)


def _refer(reference: BackboneRef, source: Path, folder: Path, progress: Progress) -> BackboneRef:
    """A reference that holds from everywhere: what lay beside the checkpoint is named by its full path."""
    if reference.kind == "embedded":
        root = (source / reference.path).resolve()
        gguf = next((name for name in reference.sha256 if name.endswith(".gguf")), None)
        kind, path = ("gguf", root / gguf) if gguf else ("hf", root)
        reference = replace(reference, kind=kind, path=str(path))
    if reference.files(source):
        with progress.task("hash the backbone"):
            reference.verify(source)
    return reference


def _cached(name: str) -> str:
    """Folder of a hub model that was downloaded before."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError) as wrong:
        raise PackageError(
            f"backbone {name!r} is neither a folder nor in the hub's cache: {str(wrong).splitlines()[0]}",
            hint="download it, or export with --reference-backbone",
        ) from None


# Reading


def open_package(folder: Path, *, verify: str = "first-touch", io: str = "auto") -> Package:
    """Check a package as FORMAT.md section 3.2 says and open its tables; `verify` and `io` are RowTable's.

    Raises PackageError, naming the file and what is wrong with it.
    """
    with as_package_errors(folder):
        manifest = read_sealed(folder)
        for problem in file_problems(folder, manifest, whole=False):
            raise PackageError(problem, hint="copy the package again, or export it again")
        layout = Layout.load(folder)
        return Package(folder, manifest, layout, open_tables(folder, manifest, layout, verify, io))


@contextmanager
def as_package_errors(folder: Path) -> Iterator[None]:
    """Every way in which a package is wrong is a PackageError."""
    try:
        yield
    except PackageError:
        raise
    except EngramError as wrong:
        raise PackageError(str(wrong), hint=wrong.hint) from wrong
    except (KeyError, TypeError, ValueError, AttributeError) as wrong:
        raise PackageError(
            f"{folder / MANIFEST} has a field that is missing or of the wrong type: {wrong!r}"
        ) from wrong
    except OSError as wrong:
        raise PackageError(f"{wrong.filename or folder} cannot be read: {wrong.strerror}") from wrong


def read_sealed(folder: Path) -> dict[str, Any]:
    """The manifest, after its format, version, seal and keys were checked."""
    path = folder / MANIFEST
    if not path.is_file():
        raise PackageError(f"{folder} is no package: it holds no {MANIFEST}", hint="make one with: engram export")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as wrong:
        raise PackageError(f"{path} is not JSON: {wrong}", hint="copy the package again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise PackageError(f"{path} has format {found!r}, expected {FORMAT!r}", hint="make a package: engram export")
    if manifest.get("version") != VERSION:
        raise PackageError(
            f"{path} has version {manifest.get('version')!r}, this release reads {VERSION}",
            hint="quantize and export again from the float checkpoint, or use the release of engram that wrote it",
        )
    seals = _SEAL.findall(data)
    if len(seals) != 1 or hashlib.sha256(data.replace(seals[0], _UNSEALED)).hexdigest() != seals[0].decode():
        raise PackageError(f"{path} does not match its seal", hint="it was altered: copy the package again")
    if manifest.keys() != _FIELDS:
        raise PackageError(f"{path} has the fields {sorted(manifest)}, version {VERSION} has {sorted(_FIELDS)}")
    return manifest


def file_problems(folder: Path, manifest: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """What is wrong with the files that the manifest names; `whole` hashes the large ones too."""
    backbone = manifest["backbone"]
    hashes: dict[str, str] = dict(manifest["sha256"])
    for table in manifest["tables"].values():
        hashes |= entry_hashes(table)
    if backbone["kind"] == "embedded" and backbone["path"] != "backbone":
        yield f"{folder / MANIFEST} says that the backbone is embedded in {backbone['path']!r}, not in 'backbone'"
        return
    if backbone["kind"] == "embedded":
        hashes |= {f"backbone/{name}": value for name, value in backbone["sha256"].items()}
    if hashes.keys() != manifest["bytes"].keys():
        yield f"{folder / MANIFEST} names other files in 'bytes' than it has hashes for"
        return
    for name, size in manifest["bytes"].items():
        path = folder / name
        if not is_plain(name):
            yield f"{folder / MANIFEST} names a file {name!r}, which may lie outside the package"
        elif not path.is_file():
            yield f"{path} is missing, the manifest names it"
        elif path.stat().st_size != size:
            kind = "truncated" if path.stat().st_size < size else "longer"
            yield f"{path} has {path.stat().st_size} bytes, the manifest says {size}: it is {kind}"
        elif whole or not name.startswith("tables/") and (size <= _SMALL or not name.startswith(_LARGE)):
            if (found := hash_file(path)) != hashes[name]:
                yield f"{path} has SHA-256 {found}, the manifest says {hashes[name]}: it was altered"
    for path in [*_files(folder / "tables"), *_files(folder / "backbone")]:
        if path.relative_to(folder).as_posix() not in manifest["bytes"]:
            yield f"{path} is not part of the package: the manifest does not name it"


def open_tables(
    folder: Path, manifest: dict[str, Any], layout: Layout, verify: str, io: str = "auto"
) -> dict[int, RowTable]:
    """Map the tables after comparing each with manifest and layout; all are closed again if one is refused."""
    tables_only = manifest["backbone"]["kind"] == "none"
    for name, layers in (("tables", layout.layers), ("gate", () if tables_only else layout.layers)):
        if sorted(map(int, manifest[name])) != sorted(layers):
            raise PackageError(
                f"{folder / MANIFEST} has {name} for layers {sorted(map(int, manifest[name]))}, "
                f"its layout has {sorted(layers)}"
            )
    opened: dict[int, RowTable] = {}
    try:
        for layer in layout.layers:
            opened[layer] = open_package_table(folder, manifest["tables"][str(layer)], layer, layout, verify, io)
    except BaseException:
        for table in opened.values():
            table.close()
        raise
    return opened


def open_package_table(
    folder: Path, entry: dict[str, Any], layer: int, layout: Layout, verify: str, io: str = "auto"
) -> RowTable:
    return open_entry(
        folder, entry, layer=layer, rows=layout.table_rows[layer], width=layout.head_dim, verify=verify, io=io
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
