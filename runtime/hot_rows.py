"""The rows that a user's own text reads most, kept beside a package: the file, and how a reader serves them.

`hot/layer-NN.safetensors` holds the ids of some rows and their stored bytes, with the seal of the table that they were
taken from and a checksum (FORMAT.md section 5). It is read from beginning to end when a package is opened with its
tables on disk and cold: one sequential read in place of U scattered ones. engram warm (warm.py) writes it.

Shape letters: U rows kept, K bytes a row, N rows asked for.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.builders.atomic import write_whole
from engram.builders.fetch import cache_folder
from engram.builders.process_memory import cached_share
from engram.kernels.codecs import Bytes, Codec
from engram.quantize.mapped import PagedTable
from engram.quantize.row_store import PAGE
from engram.quantize.row_table import RowTable

Ints = NDArray[np.int64]

FORMAT = "engram-hot-rows"
VERSION = "1"
FOLDER = "hot"
WARM = 0.9  # of a table's pages are cached: the hot rows stay on the disk
CACHED = ("mmap", "numpy", "pread")  # ways of reading a table after which its pages stay in the page cache
_ALIGN = 64
_AGAIN = "make it again with: engram warm, or remove it with: engram warm PACKAGE --drop"


class HotRowsError(EngramError):
    """Hot rows that are damaged, belong to another table, or cannot be recorded or measured."""


class HasManifest(Protocol):
    """What finding the hot rows needs of a package."""

    @property
    def folder(self) -> Path:
        """The package's folder."""

    @property
    def manifest(self) -> dict[str, Any]:
        """Its manifest: the seals of its tables."""

    @property
    def layers(self) -> Mapping[int, RowTable]:
        """Its tables."""


@dataclass(frozen=True)
class Split:
    """How the rows of one request are served: places in the request, and where the hot ones lie."""

    hot_N: Ints  # places that the hot rows serve
    kept_N: Ints  # for each of them, which kept row
    cold_N: Ints  # all other places


class HotRows:
    """The hot rows of one table, in memory, and a mark for each page of the table that was asked for.

    A mark that is wrong (pages were dropped again; threads met) costs time, never a row.
    """

    def __init__(self, table: PagedTable, rows_U: Ints, bytes_UK: Bytes) -> None:
        self.codec: Codec = table.codec
        self.rows_U, self.bytes_UK = rows_U, bytes_UK
        self._per_page = max(1, PAGE // table.row_bytes)
        self._cached = table.io in CACHED
        self._asked_P = np.zeros(table.rows // self._per_page + 1, dtype=bool)

    def split(self, rows_N: Ints) -> Split | None:
        """How to serve rows: those kept here whose page nobody asked for yet come from here; None where none does.

        Rows on pages that were asked for are left to the table: they are in memory already, or on their way. Where the
        table is read past the page cache, nothing stays in memory, and every row that is kept here is served.
        """
        pages_N = rows_N // self._per_page
        cold = np.flatnonzero(~self._asked_P[pages_N])
        if not cold.size:
            return None
        wanted = rows_N[cold]
        kept = np.minimum(np.searchsorted(self.rows_U, wanted), len(self.rows_U) - 1)
        found = self.rows_U[kept] == wanted
        hot = cold[found]
        if self._cached:
            self._asked_P[pages_N[cold[~found]]] = True
        if not hot.size:
            return None
        others = np.ones(len(rows_N), dtype=bool)
        others[hot] = False
        return Split(hot, kept[found], np.flatnonzero(others))


def places(package: HasManifest) -> tuple[Path, Path]:
    """Where hot rows may lie: in the package, or (a package that cannot be written to) in the user's cache folder."""
    return package.folder / FOLDER, cache_folder() / FOLDER / str(package.manifest["manifest_seal"])


def find(package: HasManifest) -> Path | None:
    """The folder with the package's hot rows, or None."""
    return next((folder for folder in places(package) if folder.is_dir()), None)


def for_reader(package: HasManifest, most_bytes: int | None = None) -> dict[int, HotRows]:
    """The package's hot rows where they can help: not while its tables are in the page cache already.

    None either where their files hold more than `most_bytes`. Raises HotRowsError as `load_all`.
    """
    folder = find(package)
    if folder is None:
        return {}
    if most_bytes is not None and sum(path.stat().st_size for path in folder.iterdir()) > most_bytes:
        return {}
    tables = package.layers.values()
    if all(table.io in CACHED for table in tables):
        shares = [cached_share(path) for table in tables for path in table.paths]
        if all(share is not None and share > WARM for share in shares):
            return {}
    return load_all(package, folder)


def drop(package: HasManifest) -> list[Path]:
    """Remove the package's hot rows wherever they are; the folders that were removed."""
    found = [folder for folder in places(package) if folder.is_dir()]
    for folder in found:
        shutil.rmtree(folder)
    return found


def load_all(package: HasManifest, folder: Path) -> dict[int, HotRows]:
    """The hot rows in a folder, by layer.

    Raises HotRowsError for a file that is damaged or was taken from another table than the package's.
    """
    out = {}
    for layer, table in package.layers.items():
        path = folder / file_name(layer)
        if path.is_file():
            out[layer] = load(path, one_codec(table), str(package.manifest["tables"][str(layer)]["seal"]))
    return out


def one_codec(table: RowTable) -> PagedTable:
    """The table, after refusing a mixed one: a file of hot rows has one codec for all of them."""
    if not isinstance(table, PagedTable):
        raise HotRowsError(
            f"the table of layer {table.layer} in {table.path} mixes codecs; hot rows are kept of tables that have one",
            hint="quantize with one codec a table to use engram warm",
        )
    return table


def file_name(layer: int) -> str:
    """Name of a layer's file in the folder."""
    return f"layer-{layer:02d}.safetensors"


def save(path: Path, rows_U: Ints, bytes_UK: Bytes, *, layer: int, seal: str) -> int:
    """Write the hot rows of one table whole or not at all; its size in bytes. `rows_U` ascends strictly."""
    body = np.ascontiguousarray(rows_U, dtype="<i8").tobytes() + np.ascontiguousarray(bytes_UK).tobytes()
    content = _header(*bytes_UK.shape, layer=str(layer), seal=seal, crc32=f"{zlib.crc32(body):08x}") + body
    write_whole(path, content)
    return len(content)


def _header(count: int, row_bytes: int, *, layer: str, seal: str, crc32: str) -> bytes:
    """The file up to its data: a function of its fields alone."""
    ids, end = 8 * count, (8 + row_bytes) * count
    text = json.dumps(
        {
            "__metadata__": {"format": FORMAT, "version": VERSION, "layer": layer, "seal": seal, "crc32": crc32},
            "rows": {"dtype": "I64", "shape": [count], "data_offsets": [0, ids]},
            "bytes": {"dtype": "U8", "shape": [count, row_bytes], "data_offsets": [ids, end]},
        },
        separators=(",", ":"),
    ).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def load(path: Path, table: PagedTable, seal: str) -> HotRows:
    """Read the hot rows of a table.

    Raises HotRowsError where the file is damaged or of another version, or was taken from a table with another seal.
    """
    content = np.fromfile(path, dtype=np.uint8)
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    body = content[begin:]
    try:
        header = json.loads(content[8:begin].tobytes())
        fields, (count, row_bytes) = dict(header["__metadata__"]), header["bytes"]["shape"]
        found = fields.pop("format"), fields.pop("version")
        ours = found == (FORMAT, VERSION)
        altered = ours and content[:begin].tobytes() != _header(count, row_bytes, **fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HotRowsError(f"{path} has no header of hot rows", hint=_AGAIN) from None
    if not ours:
        raise HotRowsError(f"{path} has format {found[0]} {found[1]}, expected {FORMAT} {VERSION}", hint=_AGAIN)
    if altered or body.size != count * (8 + row_bytes) or f"{zlib.crc32(body.data):08x}" != fields["crc32"]:
        raise HotRowsError(f"{path} is damaged: its content does not match its header and checksum", hint=_AGAIN)
    if fields["seal"] != seal or fields["layer"] != str(table.layer) or row_bytes != table.row_bytes:
        raise HotRowsError(
            f"{path} holds rows of another table than {table.path}, its seal is {fields['seal'][:16]}…", hint=_AGAIN
        )
    ids = body[: 8 * count].view("<i8").astype(np.int64)
    if not (count and ids[0] >= 0 and ids[-1] < table.rows and (np.diff(ids) > 0).all()):
        raise HotRowsError(f"{path} must name at least one row, ascending, within {table.rows}", hint=_AGAIN)
    return HotRows(table, ids, body[8 * count :].reshape(count, row_bytes))
