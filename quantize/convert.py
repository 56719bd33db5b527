"""`engram convert`: a published checkpoint's tables into our package, or a map of where they lie.

Everything else of the memory (gates, projections, stored constants) is kept beside them byte for byte, so that
`engram export` can write the published layout again. The backbone stays where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engram import EngramError, Progress, __version__
from engram.builders.atomic import resumable_folder, sync_tree
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import TOKENIZER_FILES, table_file
from engram.builders.families.family import Published
from engram.builders.families.known import find_published
from engram.builders.families.layouts import compresses, layout_of
from engram.builders.fetch import hash_file
from engram.builders.layout import Layout
from engram.builders.process_memory import resident_bytes
from engram.builders.tensor_files import TensorFiles
from engram.kernels.codecs import Bytes, Codec, find_codec
from engram.quantize.entries import entry_bytes
from engram.quantize.extent_writer import map_extents
from engram.quantize.extents import SUFFIX
from engram.quantize.folder import check_target
from engram.quantize.foreign_rows import ForeignRows
from engram.quantize.journal import Journal
from engram.quantize.package import TOKEN_MAP, file_sizes, write_manifest
from engram.quantize.row_store import Geometry, RowWriter
from engram.quantize.source_parts import SOURCE, describe_source, keep_source
from engram.quantize.stream import encode_block


class ConvertError(EngramError):
    """A conversion that may not be written where it should, or whose source changed while it was read."""


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and where the package goes.

    `in_place`: the rows stay in the files of the source, and the package holds a map of them. `tables`: another codec
    to store the rows in; None keeps them byte for byte. `tokenizer`: a folder, tokenizer.json or hub name, where the
    source has none of its own.
    """

    source: Path
    out: Path
    in_place: bool = False
    tables: str | None = None
    tokenizer: str | None = None
    force: bool = False


def convert(config: ConvertConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Write a package of a published checkpoint's tables; the fields of `engram convert --json`.

    Memory does not grow with the tables, and only the shards that hold them are read. A run that was killed goes on
    where it came to. Raises FamilyError, LayoutError and ForeignError for a source that contradicts itself, its
    tokenizer or our formats, ConvertError for one that changes meanwhile.
    """
    begin = time.monotonic()
    progress = progress or Progress()
    check_target(config.source, config.out, force=config.force, error=ConvertError)
    if config.in_place and config.tables is not None:
        raise ConvertError("rows that stay in place keep their codec", hint="leave out --tables, or --in-place")
    codec = None if config.tables is None else find_codec(config.tables)
    found, files = find_published(config.source)
    rows = [ForeignRows.of(table) for table in found.tables]
    for table in rows:  # refuse before any work
        Geometry(codec or table.codec, table.rows, table.width, table.layer)
    layout = layout_of(found, config.source, config.tokenizer)
    stamps = _stamps(found)
    with resumable_folder(config.out, force=config.force, error=ConvertError) as work:
        job = {
            "release": __version__, "in_place": config.in_place, "codec": config.tables, "layout": layout.to_json(),
            "source": stamps,
        }  # fmt: skip
        folder, journal = work.folder, Journal(work.folder, job)
        if journal.said:
            progress.say(journal.said)
        (folder / "tables").mkdir(exist_ok=True)
        write = _map if config.in_place else _copy if codec is None else partial(_encode, codec)
        try:
            tables = {str(table.layer): write(table, folder, journal, progress) for table in rows}
        except BaseException as failure:
            if not isinstance(failure, EngramError):
                progress.say(f"{folder} keeps what is done: the same command goes on from there")
            raise
        if (now := _stamps(found)) != stamps:
            changed = [name for name in stamps if now[name] != stamps[name]]
            raise ConvertError(f"{', '.join(changed)} changed while it was converted", hint="start again")
        _finish(config, folder, found, files, layout, tables)
    return {
        "out": str(config.out), "family": found.family, "dialect": layout.dialect, "in_place": config.in_place,
        "layers": list(layout.layers), "rows": sum(layout.table_rows.values()),
        "tables": {n: {"codec": t["codec"], "rows": t["rows"], "bytes": entry_bytes(t)} for n, t in tables.items()},
        "bytes": sum(table.rows * table.row_bytes for table in rows), "missing": sorted(found.absent),
        "seconds": time.monotonic() - begin, "peak_rss_bytes": resident_bytes()["peak_rss_bytes"],
    }  # fmt: skip


def _stamps(found: Published) -> dict[str, list[int]]:
    """Size and time of every file that holds rows."""
    files = dict.fromkeys(file for table in found.tables for file in table.files)
    return {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files}


def _copy(rows: ForeignRows, folder: Path, journal: Journal, progress: Progress) -> dict[str, Any]:
    """A table file of the same bytes, a row's values and scales together; its entry of the manifest."""
    return _write(rows, rows.codec, lambda block, _: block, folder, journal, progress)


def _encode(codec: Codec, rows: ForeignRows, folder: Path, journal: Journal, progress: Progress) -> dict[str, Any]:
    """A table file of the rows in another codec."""

    def encoded(block: Bytes, first: int) -> Bytes:
        return encode_block(rows.codec.decode(block, rows.width), codec, table=f"layer {rows.layer}", first_row=first)

    return _write(rows, codec, encoded, folder, journal, progress)


def _write(
    rows: ForeignRows, codec: Codec, made: Callable[[Bytes, int], Bytes], folder: Path, journal: Journal,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The table file of what `made` makes of the rows, from where an earlier run came to."""
    name = table_file(rows.layer)
    noted = journal.notes.get(str(rows.layer), {})
    if _is_written(folder, noted, rows.layer, progress):
        return dict(noted["written"])
    with (
        RowWriter(folder / name, rows.rows, rows.width, codec, rows.layer, resume=noted.get("rows", 0), keep=True)
        as writer,
        progress.task(f"layer {rows.layer} as {codec.name}", rows.rows * rows.row_bytes, "B") as task,
    ):  # fmt: skip
        if noted.get("rows"):
            what = "going on at" if writer.count else "what an earlier run wrote is damaged: starting over, not at"
            progress.say(f"layer {rows.layer}: {what} row {noted['rows']:,} of {rows.rows:,}")
        task.advance(writer.count * rows.row_bytes)
        for block in rows.blocks(rows.block_rows(writer.geometry.rows_per_page), writer.count):
            writer.append(made(block, writer.count))
            task.advance(block.nbytes)
            if journal.due:
                writer.sync()
                journal.note(str(rows.layer), {"rows": writer.count})
    assert writer.table_file is not None
    return _written(journal, rows.layer, {"file": name, **asdict(writer.table_file)})


def _map(rows: ForeignRows, folder: Path, journal: Journal, progress: Progress) -> dict[str, Any]:
    """An extent map into the source's files; its entry of the manifest."""
    name = table_file(rows.layer).removesuffix(".safetensors") + SUFFIX
    noted = journal.notes.get(str(rows.layer), {})
    if _is_written(folder, noted, rows.layer, progress):
        return dict(noted["written"])

    def after(synced: Any) -> None:
        if journal.due:
            journal.note(str(rows.layer), {"map": synced()})

    if noted.get("map"):
        progress.say(f"layer {rows.layer}: going on at block {noted['map']['blocks']:,}")
    map_extents(
        folder / name, rows.parts, rows.codec, rows=rows.rows, width=rows.width, layer=rows.layer, progress=progress,
        resume=noted.get("map"), after=after,
    )  # fmt: skip
    digest = hash_file(folder / name)
    entry = {
        "file": name, "codec": rows.codec.name, "codec_version": rows.codec.version, "rows": rows.rows,
        "width": rows.width, "bytes": (folder / name).stat().st_size, "sha256": digest, "seal": digest,
    }  # fmt: skip
    return _written(journal, rows.layer, entry)


def _is_written(folder: Path, noted: Mapping[str, Any], layer: int, progress: Progress) -> bool:
    """Whether an earlier run finished this table."""
    entry = noted.get("written")
    if entry is None or not (path := folder / entry["file"]).is_file() or path.stat().st_size != entry["bytes"]:
        return False
    progress.say(f"layer {layer}: written by an earlier run")
    return True


def _written(journal: Journal, layer: int, entry: dict[str, Any]) -> dict[str, Any]:
    journal.note(str(layer), {"written": entry})
    return entry


def _finish(
    config: ConvertConfig, folder: Path, found: Published, files: TensorFiles, layout: Layout,
    tables: Mapping[str, Any],
) -> None:  # fmt: skip
    """What is small: token map, tokenizer, the rest of the memory, and the manifest."""
    layout.save_map(folder)
    names = [TOKEN_MAP] if layout.token_map is not None else []
    home = config.source if config.source.is_dir() else config.source.parent
    if config.tokenizer is not None or compresses(found) or (home / TOKENIZER_FILES[0]).is_file():
        from engram.builders.tokenizer import save_tokenizer

        save_tokenizer(config.tokenizer or home, folder)
        names += [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    names += keep_source(config.source, folder / SOURCE, found, files)
    sync_tree(folder)
    origin = {"family": found.family, "release": __version__, "published": describe_source(config.source, found, files)}
    write_manifest(
        folder, origin=origin, layout=layout, gate={}, backbone=BackboneRef("none", found.family), tables=tables,
        sha256={name: hash_file(folder / name) for name in names}, sizes=file_sizes(folder),
    )  # fmt: skip
