"""`engram quantize`: a float checkpoint's tables through a row codec, row block by row block, with the error of each.

Shape letters: n rows of a block, D width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engram import EngramError, Progress, Task, __version__
from engram.builders.atomic import MARK, Unfinished, check_replaceable, resumable_folder, sync_tree, write_whole
from engram.builders.backbone import BackboneError, BackboneRef
from engram.builders.checkpoint import MANIFEST, Checkpoint, open_checkpoint, table_file
from engram.kernels.codecs import Floats, find_codec
from engram.quantize.backbone import quantize_backbone
from engram.quantize.backbone_config import FOLDER, BackboneConfig
from engram.quantize.class_map import ClassMap
from engram.quantize.entries import entry_bytes, written_files
from engram.quantize.folder import check_target, rejected_name
from engram.quantize.journal import Journal
from engram.quantize.mixed_writer import MixedWriter
from engram.quantize.plan import TablePlan
from engram.quantize.row_store import Geometry, RowWriter
from engram.quantize.stream import FloatRows, RowErrors, block_rows, stream_table

FORMAT = "engram-quantized"
VERSION = 1
_LEFT_BEHIND = ("tables", "state", MANIFEST, MARK)  # state resumes the training of float tables


class QuantizeError(EngramError):
    """A checkpoint whose tables cannot be quantized."""


@dataclass(frozen=True)
class QuantizeConfig:
    """What to quantize, how, and where the result goes."""

    checkpoint: Path
    out: Path
    tables: str = "int8"
    plans: Mapping[int, TablePlan] | None = None  # by layer; all rows in `tables` where there is none
    backbone: BackboneConfig | None = None  # None: copied or referred to as it is; its `out` is not looked at
    force: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)  # what else the manifest tells


def quantize(
    config: QuantizeConfig, progress: Progress | None = None, judge: Callable[[Path], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Write a quantized checkpoint: tables through the codec, everything else unchanged but for `state/`.

    Returns the fields of `engram quantize --json`. Memory does not grow with the tables. A run that was killed or
    stopped goes on where it came to, if it is started again for the same checkpoint, codecs, backbone and release.

    `judge` is asked about the written folder before it appears under its name. Its report goes into the manifest as
    "quality"; if it says {"passed": False}, the folder becomes OUT.rejected instead.

    Raises CheckpointError for a source that is no sound float checkpoint, CodecError for an unknown codec, an unfit
    width or a value that is not finite, QuantizeError where `out` may not be written, and what `judge` raises: then
    what is written stays, to go on from.
    """
    begin = time.monotonic()
    progress = progress or Progress()
    every = None if config.plans else find_codec(config.tables).name
    check_target(config.checkpoint, config.out, force=config.force, error=QuantizeError)
    if judge is not None:
        check_replaceable(rejected_name(config.out), force=config.force, error=QuantizeError)
    checkpoint = open_checkpoint(config.checkpoint)
    layout = checkpoint.layout
    plans = dict(config.plans or {n: TablePlan.uniform(str(every), layout) for n in layout.layers})
    for layer, plan in plans.items():
        for codec in plan.stored():
            Geometry(codec, layout.table_rows[layer], layout.head_dim, layer)  # refuse before any work
    with (
        resumable_folder(config.out, force=config.force, error=QuantizeError) as work,
        _says_what_stays(work, progress),
    ):
        folder, journal = work.folder, Journal(work.folder, _job(checkpoint, plans, config.backbone))
        if journal.said:
            progress.say(journal.said)
        (folder / "tables").mkdir(exist_ok=True)
        _copy_others(checkpoint, folder, but=("backbone",) if config.backbone else ())
        manifest = checkpoint.manifest | {"format": FORMAT, "version": VERSION, **config.record}
        backbone: Any = "unchanged"
        if config.backbone is not None:  # before the tables: it is smaller, and what it cannot do is found soon
            backbone, reference = _backbone(config.backbone, folder, journal, progress)
            manifest |= {"backbone": reference, "backbone_quantized": backbone}
        tables = {str(n): _table(checkpoint, n, plans[n], folder, journal, progress) for n in layout.layers}
        manifest["tables"] = {n: table["written"] for n, table in tables.items()}
        _write_manifest(folder, manifest)
        report: dict[str, Any] = {}
        if judge is not None:
            work.keep = True
            report["quality"] = dict(judge(folder))
            report["passed"] = report["quality"].get("passed", True)
            _write_manifest(folder, manifest | {"quality": report["quality"]})
            work.out = config.out if report["passed"] else rejected_name(config.out)
    errors = {n: table["report"] for n, table in tables.items()}
    return {
        "out": str(work.out), "tables": errors, "backbone": backbone, **report, "seconds": time.monotonic() - begin,
    }  # fmt: skip


@contextmanager
def _says_what_stays(work: Unfinished, progress: Progress) -> Iterator[None]:
    try:
        yield
    except BaseException as failure:
        if work.keep or not isinstance(failure, EngramError):
            progress.say(f"{work.folder} keeps what is done: the same command goes on from there")
        raise


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())


def _job(
    checkpoint: Checkpoint, plans: Mapping[int, TablePlan], backbone: BackboneConfig | None
) -> dict[str, Any]:
    """What an unfinished folder must have been made from for this run to go on with it."""
    found = {n: (checkpoint.folder / table_file(n)).stat() for n in checkpoint.layout.layers}
    return {
        "release": __version__,
        "codecs": {str(n): plan.fingerprint() for n, plan in plans.items()},
        "backbone": None if backbone is None else backbone.fingerprint(),
        "source": {
            "manifest": hashlib.sha256((checkpoint.folder / MANIFEST).read_bytes()).hexdigest(),
            "tables": {str(n): [stat.st_size, stat.st_mtime_ns] for n, stat in found.items()},
        },
    }


def _backbone(
    config: BackboneConfig, folder: Path, journal: Journal, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What became of the backbone, and the reference to it. What an earlier run finished stays."""
    noted = journal.notes.get("backbone")
    if noted is not None:
        try:
            BackboneRef.from_json(noted["reference"]).verify(folder)
        except BackboneError as wrong:
            progress.say(f"backbone: what an earlier run wrote is damaged, starting over ({wrong})")
        else:
            progress.say("backbone: written by an earlier run")
            return noted["report"], noted["reference"]
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    report, reference = quantize_backbone(replace(config, out=folder), progress)
    sync_tree(folder / FOLDER)
    journal.note("backbone", {"report": report, "reference": reference.to_json()})
    return report, reference.to_json()


def _copy_others(checkpoint: Checkpoint, folder: Path, but: Sequence[str]) -> None:
    """Everything but the tables and the training state, before the long work: a damaged backbone is found at once."""
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name in (*_LEFT_BEHIND, *but):
            continue
        target = folder / path.name
        shutil.copytree(path, target, dirs_exist_ok=True) if path.is_dir() else shutil.copyfile(path, target)
    if checkpoint.backbone.kind == "embedded" and not but:
        checkpoint.backbone.verify(folder)


def _table(
    checkpoint: Checkpoint, layer: int, plan: TablePlan, folder: Path, journal: Journal, progress: Progress
) -> dict[str, Any]:
    """One table as its plan says: its manifest entry and what it lost. What an earlier run finished stays."""
    noted = journal.notes.get(str(layer), {})
    if "written" in noted and all(_has(folder, item) for item in written_files(noted["written"])):
        progress.say(f"layer {layer}: written by an earlier run")
        return dict(noted)
    write = _write_mixed if plan.mixed else _write_one
    entry, errors = write(checkpoint, layer, plan, folder, journal, progress)
    report = {
        "codec": plan.name, "rows": entry["rows"], "width": entry["width"], "bytes": entry_bytes(entry),
        "bytes_before": (checkpoint.folder / table_file(layer)).stat().st_size,
        "rel_error": errors.rel_error, "worst_row": errors.worst_row, "worst_row_error": errors.worst_row_error,
    }  # fmt: skip
    done = {"written": entry, "report": report}
    journal.note(str(layer), done)
    return done


def _has(folder: Path, item: Mapping[str, Any]) -> bool:
    path = folder / item["file"]
    return bool(path.is_file() and path.stat().st_size == item["bytes"])


def _write_mixed(
    checkpoint: Checkpoint, layer: int, plan: TablePlan, folder: Path, journal: Journal, progress: Progress
) -> tuple[dict[str, Any], RowErrors]:
    """A table of several classes, from where an earlier run came to."""
    source = float_rows(checkpoint, layer)
    class_map = ClassMap.build(source.rows, plan.blocks(checkpoint.layout, layer))
    codecs = [None if name is None else find_codec(name) for name in plan.codecs]
    noted = journal.notes.get(str(layer), {})
    with (
        MixedWriter(
            folder, layer, class_map, codecs, width=source.width, resume=noted.get("rows", 0), keep=True
        ) as writer,
        progress.task(f"layer {layer} to {plan.name}", source.rows, "rows") as task,
    ):
        part = _Part(layer, source.rows, writer, journal, progress, task)
        for block in source.blocks(block_rows(source.width), writer.count):
            part.errors.add(*writer.append(block))
            task.advance(len(block))
            part.after(writer.count)
    assert writer.entry is not None
    return writer.entry, part.errors


def _write_one(
    checkpoint: Checkpoint, layer: int, plan: TablePlan, folder: Path, journal: Journal, progress: Progress
) -> tuple[dict[str, Any], RowErrors]:
    """A table of one codec, from where an earlier run came to."""
    (codec,) = plan.stored()
    target, noted = folder / table_file(layer), journal.notes.get(str(layer), {})
    source = float_rows(checkpoint, layer)
    with (
        RowWriter(
            target, source.rows, source.width, codec, layer, resume=noted.get("rows", 0), keep=True
        ) as writer,
        progress.task(f"layer {layer} to {codec.name}", source.rows, "rows") as task,
    ):
        part = _Part(layer, source.rows, writer, journal, progress, task)
        blocks = source.blocks(block_rows(source.width, writer.geometry.rows_per_page), writer.count)
        stream_table(
            blocks, writer, codec, part.errors, table=f"layer {layer}", first_row=writer.count, task=task,
            after=part.after,
        )  # fmt: skip
    assert writer.table_file is not None
    return {"file": table_file(layer), **asdict(writer.table_file)}, part.errors


class _Part:
    """What every table does while it is written: says where it goes on, shows its rate, notes what is on the disk."""

    def __init__(
        self, layer: int, rows: int, writer: RowWriter | MixedWriter, journal: Journal, progress: Progress, task: Task
    ) -> None:
        noted = journal.notes.get(str(layer), {})
        self.layer, self.writer, self.journal, self.task = layer, writer, journal, task
        self.errors = RowErrors(**noted["errors"]) if writer.count else RowErrors()
        if noted.get("rows"):
            what = "going on at" if writer.count else "what an earlier run wrote is damaged: starting over, not at"
            progress.say(f"layer {layer}: {what} row {noted['rows']:,} of {rows:,}")
        task.advance(writer.count)
        self._begin, self._first = time.monotonic(), writer.count

    def after(self, done: int) -> None:
        """So many rows of the table were appended."""
        self.task.note(f"{(done - self._first) / max(time.monotonic() - self._begin, 1e-9):,.0f} rows/s")
        if self.journal.due:
            self.writer.sync()
            self.journal.note(str(self.layer), {"rows": done, "errors": asdict(self.errors)})


def float_rows(checkpoint: Checkpoint, layer: int) -> FloatRows:
    """Where a layer's float32 rows lie: read beside the mapping, so that memory stays bounded."""
    mapped = checkpoint.table(layer)
    assert isinstance(mapped, np.memmap)
    rows, width = mapped.shape
    return FloatRows(checkpoint.folder / table_file(layer), mapped.offset, rows, width)


def float_blocks(checkpoint: Checkpoint, layer: int) -> Iterator[Floats]:
    """The layer's float32 rows in order, [n, D] at a time, each block valid until the next one is asked for."""
    source = float_rows(checkpoint, layer)
    return source.blocks(block_rows(source.width))
