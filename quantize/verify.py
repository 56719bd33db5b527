"""`engram verify`: is a package whole, do its constants follow from its own rules, are its rows those of its source?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import MANIFEST, TOKENIZER_FILES
from engram.builders.families.known import find_published
from engram.builders.families.layouts import layout_of
from engram.builders.golden_rows import constant_problems, golden_problems
from engram.builders.layout import Layout
from engram.builders.tensor_files import Tensor, TensorFiles, read_header
from engram.quantize.foreign_rows import ForeignRows
from engram.quantize.mapped import PagedTable
from engram.quantize.package import (
    Package,
    PackageError,
    as_package_errors,
    file_problems,
    open_package,
    open_package_table,
    open_tables,
    read_sealed,
)
from engram.quantize.source_parts import DENSE, SOURCE, tensor_blocks
from engram.quantize.stream import encode_block

SAMPLE = 100_000  # random rows of each table that are compared with the source
_AT_ONCE = 4096


def verify_package(
    folder: Path, progress: Progress | None = None, *, against: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Check everything: whole files, every page, every row, the backbone; all problems are gathered, none raised.

    `against` is the published checkpoint that it was converted from: constants are recomputed from that, random rows
    are compared with it byte for byte, the first and the last of each table among them, and the rest of the memory.

    Returns {"ok", "checked": {"files", "bytes", "tables", "pages", "rows", "constants", "golden_rows"; with `against`
    also "rows_compared", "tensors_compared"}, "problems"}. Raises PackageError only where there is no package at all,
    and what the source's family raises where it is no source.
    """
    progress = progress or Progress()
    checked = {"files": 0, "bytes": 0, "tables": 0, "pages": 0, "rows": 0}
    problems: list[str] = []
    if not (folder / MANIFEST).is_file():
        raise PackageError(f"{folder} is no package: it holds no {MANIFEST}", hint="make one with: engram export")
    try:
        with as_package_errors(folder):
            manifest = read_sealed(folder)
            with progress.task("hash all files"):
                problems += file_problems(folder, manifest, whole=True)
            checked["files"], checked["bytes"] = len(manifest["bytes"]), sum(manifest["bytes"].values())
            layout = Layout.load(folder)
            for layer in layout.layers:
                problems += _table_problems(folder, manifest, layer, layout, checked, progress)
            Package(folder, manifest, layout, open_tables(folder, manifest, layout, "off")).close()
            reference = BackboneRef.from_json(manifest["backbone"])
            if reference.kind != "embedded":
                reference.verify(folder)
            problems += _hash_problems(manifest, layout, checked)
            if against is not None:
                problems += _source_problems(folder, against, seed, checked, progress)
    except PackageError as wrong:
        problems.append(str(wrong))
    problems = list(dict.fromkeys(problems))
    return {"ok": not problems, "checked": checked, "problems": problems}


def _hash_problems(manifest: Mapping[str, Any], layout: Layout, checked: dict[str, int]) -> list[str]:
    """Known row ids of the dialect with this build, and constants that follow from the layout's other fields.

    A GGUF states its multipliers and not what they were made from: then only its row ids can be compared.
    """
    checked["golden_rows"], problems = golden_problems(layout.dialect)
    published = manifest["origin"].get("published", {})
    if published.get("form") != "gguf":
        checked["constants"], more = constant_problems(layout)
        problems += more
    return problems


def _source_problems(
    folder: Path, source: Path, seed: int, checked: dict[str, int], progress: Progress
) -> Iterator[str]:
    """Where a package differs from the published checkpoint that it was converted from."""
    found, files = find_published(source)
    if found.family != (family := read_sealed(folder)["origin"].get("family")):
        yield f"{source} is of family {found.family}, {folder} was converted from {family or 'none'}"
        return
    own = folder / TOKENIZER_FILES[0]
    tokenizer = None if (source / TOKENIZER_FILES[0]).is_file() or not own.is_file() else own
    with open_package(folder) as package:
        said, here = layout_of(found, source, tokenizer).to_json(), package.layout.to_json()
        for name in said:
            if said[name] != here[name]:
                yield f"{name} is {_short(here[name])} in {folder}, {source} makes {_short(said[name])}"
        checked["rows_compared"] = 0
        for table in found.tables:
            rows, mine = ForeignRows.of(table), package.layers.get(table.layer)
            if not isinstance(mine, PagedTable) or (mine.width, mine.rows) != (rows.width, rows.rows):
                yield f"layer {table.layer} is no table of {rows.rows:,} rows of {rows.width} values, as {source} has"
                continue
            yield from _row_problems(mine, rows, seed, checked, progress)
    yield from _dense_problems(folder / SOURCE / DENSE, source, files, checked)


def _row_problems(
    mine: PagedTable, rows: ForeignRows, seed: int, checked: dict[str, int], progress: Progress
) -> Iterator[str]:
    """Random rows, byte for byte; all of them where there are not many. Another codec's rows are encoded again."""
    wanted = np.arange(min(rows.rows, SAMPLE), dtype=np.int64)
    if rows.rows > SAMPLE:
        wanted = np.sort(np.random.default_rng(seed).integers(0, rows.rows, SAMPLE))
        wanted[0], wanted[-1] = 0, rows.rows - 1
    with progress.task(f"layer {rows.layer} against its source", len(wanted), "rows") as task:
        for first in range(0, len(wanted), _AT_ONCE):
            some = wanted[first : first + _AT_ONCE]
            theirs = rows.read_rows(some)
            if mine.codec_name != rows.codec.name:
                theirs = encode_block(rows.codec.decode(theirs, rows.width), mine.codec)
            same = (mine.gather(some) == theirs).all(axis=1)
            checked["rows_compared"] += len(some)
            task.advance(len(some))
            if not same.all():
                yield f"layer {rows.layer}: row {int(some[int(same.argmin())]):,} is not that of the source"
                return


def _dense_problems(path: Path, source: Path, files: TensorFiles, checked: dict[str, int]) -> Iterator[str]:
    """Gates, projections and stored constants, byte for byte."""
    checked["tensors_compared"] = 0
    for name, tensor in (read_header(path) if path.is_file() else {}).items():
        other = files.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape) or not _equal(tensor, other):
            yield f"{path}: {name} is not that of {source}"
        checked["tensors_compared"] += 1


def _equal(one: Tensor, other: Tensor) -> bool:
    return all(a == b for a, b in zip(tensor_blocks(one), tensor_blocks(other), strict=True))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _table_problems(
    folder: Path, manifest: dict[str, Any], layer: int, layout: Layout, checked: dict[str, int], progress: Progress
) -> Iterator[str]:
    """What is wrong with a table's header, pages and rows: the first of each kind."""
    try:
        with as_package_errors(folder), open_package_table(
            folder, manifest["tables"][str(layer)], layer, layout, "first-touch"
        ) as table, progress.task(f"layer {layer}", table.rows, "rows") as task:  # fmt: skip
            for first, block in table.decoded_blocks():
                finite = np.isfinite(block).all(axis=1)
                if not finite.all() and manifest["backbone"]["kind"] != "none":  # a published row is what it is
                    raise PackageError(
                        f"table file {table.path} (layer {layer}): row {first + int(finite.argmin())} is not finite"
                    )
                task.advance(len(block))
            checked["tables"] += 1
            checked["pages"] += table.pages
            checked["rows"] += table.rows
    except PackageError as wrong:
        yield str(wrong)
