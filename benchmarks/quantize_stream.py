"""`engram quantize` on a large table: memory, speed against the disk, and going on after a kill.

    python benchmarks/quantize_stream.py [--gib 8] [--folder FOLDER] [--codec int8] [--rounds 2] [--out FILE.json]

A float checkpoint of one layer, Gaussian rows of 256 values, no two alike, not sparse. In turns, each with the page
cache emptied of the table (proven by mincore) and the disk idle before: a plain loop that reads the table front to back
and writes as many bytes as the result has, with one fsync at the end; and the command in a process of its own, from its
start to its exit, its resident memory sampled. Then the command is killed (SIGKILL) when its journal says that half of
the rows are on the disk, started again, and its file compared with that of an uninterrupted run by SHA-256. Needs two
and a half times the table on the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from outcome import Target, arguments, finish, say

from engram.builders.atomic import MARK
from engram.builders.backbone import BackboneRef
from engram.builders.checkpoint import save_checkpoint, table_file
from engram.builders.fetch import cache_folder
from engram.builders.layout import Layout
from engram.builders.process_memory import cached_share, forget_cached
from engram.kernels.codecs import Floats

WIDTH, LAYER = 256, 0
_LOOP_BYTES = 8 << 20
COMMAND = [sys.executable, "-m", "engram.cli.main"]
# The same command, noting more often, so that a small table can be killed in its middle too.
OFTEN = [sys.executable, "-c", "import sys; from engram.quantize import journal; journal.EVERY_S = 0.2\n"
         "from engram.cli.main import main; sys.argv[0] = 'engram'; sys.exit(main())"]  # fmt: skip


class Gaussian:
    """A table that is made when it is read: block after block, each from its own seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self.shape, self._seed = (rows, WIDTH), seed

    def __getitem__(self, wanted: slice) -> Floats:
        begin, end, _ = wanted.indices(self.shape[0])
        generator = np.random.Generator(np.random.SFC64([self._seed, begin]))
        block = generator.standard_normal((end - begin, WIDTH), dtype=np.float32)
        block *= generator.uniform(0.005, 0.05, (end - begin, 1)).astype(np.float32)
        return block


def make_checkpoint(folder: Path, gib: float, seed: int) -> Path:
    """The float checkpoint; its table file."""
    layout = Layout.build(
        dialect="demo", orders=(2,), heads=1, head_dim=WIDTH, layers=(LAYER,),
        rows_per_head=int(gib * 2**30) // (4 * WIDTH), pad_id=0, vocab_size=9,
    )  # fmt: skip
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    table: Any = Gaussian(layout.table_rows[LAYER], seed)
    save_checkpoint(
        folder / "float", layout=layout, gates={LAYER: {}}, dense={LAYER: {}}, tables={LAYER: table},
        backbone=BackboneRef("hf", "some/model"), tokenizer_folder=folder / "tokenizer",
    )  # fmt: skip
    return folder / "float" / table_file(LAYER)


def make_cold(path: Path) -> None:
    """Nothing of the file in the page cache, nothing of anything left to write."""
    os.sync()
    forget_cached(path)
    share = cached_share(path)
    if share:
        raise SystemExit(f"{share:.1%} of {path.name} stays in the page cache: no cold figures can be had here")


def plain_loop(source: Path, target: Path, written_bytes: int) -> float:
    """Seconds to read a file front to back and to write so many bytes to another, with one fsync."""
    make_cold(source)
    size, buffer = source.stat().st_size, bytearray(_LOOP_BYTES)
    view, read, written = memoryview(buffer), 0, 0
    begin = time.monotonic()
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while count := reading.readinto(buffer):
            read += count
            wanted = written_bytes * read // size
            written += writing.write(view[: wanted - written])
        os.fsync(writing.fileno())
    seconds = time.monotonic() - begin
    target.unlink()
    return seconds


class Run:
    """The command in a process of its own, and what it cost."""

    def __init__(self, command: Sequence[str], folder: Path, arguments: Sequence[str]) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        words = [*command, *arguments, "--out", str(folder / "out"), "--json"]
        self._words = folder / "words.txt"
        begin = time.monotonic()
        with self._words.open("wb") as words_file:
            self._child = subprocess.Popen(
                words, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=words_file
            )
        self.peak_bytes, self._begin = 0, begin

    def wait(self, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Its JSON when it ends, or None when it was killed because `stop` said so; memory is sampled meanwhile."""
        while self._child.poll() is None:
            self.peak_bytes = max(self.peak_bytes, resident_peak(self._child.pid))
            if stop():
                self._child.kill()
                self._child.wait()
                return None
            time.sleep(0.01)
        self.seconds = time.monotonic() - self._begin
        assert self._child.stdout is not None
        if self._child.returncode:
            raise SystemExit(f"the command ended with {self._child.returncode}: {self.said}")
        found: dict[str, Any] = json.loads(self._child.stdout.read())
        return found

    @property
    def said(self) -> str:
        """Its lines on stderr."""
        return self._words.read_text()


def resident_peak(pid: int) -> int:
    """The most memory that a process has held so far, file pages that it maps included; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def noted_rows(folder: Path) -> int:
    """Rows that the unfinished run says are on the disk."""
    try:
        notes = json.loads((folder / "out.partial" / MARK).read_bytes())["notes"]
        return int(notes[str(LAYER)]["rows"])
    except (OSError, KeyError):
        return 0


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(chosen: argparse.Namespace) -> list[Target]:
    """Every line, printed and written."""
    gib = 0.5 if chosen.quick else chosen.gib
    chosen.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="engram-stream-", dir=chosen.folder) as name:
        folder = Path(name)
        say(f"making a table of {gib:g} GiB")
        source = make_checkpoint(folder, gib, chosen.seed)
        written = folder / "out" / table_file(LAYER)
        wanted = ["quantize", str(folder / "float"), "--tables", chosen.codec]
        disk, ours, peaks, whole = [], [], [], ""
        rows = result_bytes = 0
        for number in range(1 if chosen.quick else chosen.rounds):
            make_cold(source)
            run = Run(COMMAND, folder, wanted)
            report = run.wait()
            assert report is not None
            ours.append(run.seconds)
            peaks.append(run.peak_bytes)
            table = report["tables"][str(LAYER)]
            rows, result_bytes, whole = table["rows"], table["bytes"], sha256(written)
            shutil.rmtree(folder / "out")
            disk.append(plain_loop(source, folder / "copy", result_bytes))
            say(f"round {number + 1}: quantize {ours[-1]:.2f} s, plain loop {disk[-1]:.2f} s, "
                f"{peaks[-1] / 2**20:.0f} MiB resident")  # fmt: skip
        make_cold(source)
        killed = Run(OFTEN, folder, wanted)
        if killed.wait(stop=lambda: noted_rows(folder) * 2 >= rows) is not None:
            raise SystemExit("the command ended before it could be killed: take a larger --gib")
        kept = noted_rows(folder)
        again = Run(COMMAND, folder, wanted)
        report = again.wait()
        assert report is not None
        went_on = f"going on at row {kept:,}" in again.said
        same = sha256(written) == whole
        say(f"killed at {kept / rows:.0%}, again {again.seconds:.2f} s: {again.said.strip()}")
    size = 4 * WIDTH * rows
    peak = max(*peaks, killed.peak_bytes, again.peak_bytes)
    speed = statistics.median(disk) / statistics.median(ours)
    of = f"{gib:g} GiB of float32 to {chosen.codec}"
    targets = [
        Target(f"quantize, {of}: most resident memory, MiB", "<= 1024", peak / 2**20),
        Target(f"quantize, {of}: speed against a sequential read + write", ">= 0.5", speed),
        Target(f"quantize, {of}: killed and started again, the same file (1 is yes)", ">= 1", float(same)),
        Target(f"quantize, {of}: killed and started again, went on where it was (1 is yes)", ">= 1", float(went_on)),
    ]
    method = {"gib": gib, "codec": chosen.codec, "width": WIDTH, "rounds": len(ours), "words": __doc__}
    results = {
        "quantize_s": ours, "plain_loop_s": disk, "peak_resident_bytes": peaks, "bytes_read": size,
        "bytes_written": result_bytes, "quantize_million_bytes_read_per_second": size / statistics.median(ours) / 1e6,
        "plain_loop_million_bytes_read_per_second": size / statistics.median(disk) / 1e6,
        "killed_at_share": kept / rows, "rest_s": again.seconds, "sha256": whole,
    }  # fmt: skip
    return finish("quantize_stream", chosen, targets, method, results)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--gib", type=float, default=8.0, help="size of the float table")
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="on the disk that is measured")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--rounds", type=int, default=2)
    measure(parser.parse_args())
