"""From files, folders, globs and standard input to documents, one at a time.

A document is one text file, one line of a .jsonl file or one row of a .parquet file. A text larger than PIECE_BYTES is
the exception: it is cut at paragraph borders into documents of at most that size, so that no file fills the memory and
all cores find work.
What cannot be read is counted and named, never fatal unless `strict`.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from engram import EngramError, Progress
from engram.builders.zstd_stream import ZstdStream

TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
STDIN = "-"
PIECE_BYTES = 1 << 20
LONGEST_LINE_BYTES = 64 << 20
NAMED = 5  # problems that are named one by one; the rest are in the total


class CorpusError(EngramError):
    """A corpus that is missing or empty, or, with `strict`, anything in it that cannot be read."""


@dataclass(frozen=True)
class CorpusConfig:
    """Where documents come from.

    sources: files, folders (read recursively, sorted, hidden names left out), globs, `-` for standard input (text).
    field, column: which JSON field, which parquet column. strict: the first unreadable thing ends the reading.
    suffixes: further suffixes that are read as plain text in folders; a file named outright may have any suffix.
    """

    sources: tuple[str, ...]
    field: str = "text"
    column: str = "text"
    strict: bool = False
    suffixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A text and where it came from: the file, and the line, row or piece in it (from 1)."""

    text: str
    source: str
    index: int


@dataclass
class Tally:
    """What could not be read: `malformed` lines and rows left out, `undecodable` lines kept with U+FFFD."""

    malformed: int = 0
    undecodable: int = 0


@dataclass
class _Reader:
    """One pass over a corpus; holds what every format needs to report a problem."""

    config: CorpusConfig
    progress: Progress
    tally: Tally = field(default_factory=Tally)

    def problem(self, source: str, index: int, unit: str, reason: str, *, kept: bool = False) -> None:
        """Count one problem, name the first few; CorpusError where the corpus is read strictly."""
        where = f"{source}, {unit} {index}: {reason}"
        if self.config.strict:
            raise CorpusError(where, hint="repair the file, or leave --strict out to count such places and go on")
        if kept:
            self.tally.undecodable += 1
        else:
            self.tally.malformed += 1
        count = self.tally.malformed + self.tally.undecodable
        if count <= NAMED:
            self.progress.say(f"{where} ({'read with U+FFFD in its place' if kept else 'left out'})")
        elif count == NAMED + 1:
            self.progress.say("more of this kind: counted, no longer named")

    def file(self, path: str) -> Iterator[Document]:
        name = path.lower()
        try:
            if path == STDIN:
                yield from self.text(sys.stdin.buffer, path)
            elif name.endswith(PARQUET_SUFFIX):
                yield from self.parquet(path)
            elif name.endswith(LINE_SUFFIXES):
                with _open(path) as stream:
                    yield from self.lines(stream, path)
            else:
                with open(path, "rb") as stream:
                    yield from self.text(stream, path)
        except OSError as wrong:
            raise CorpusError(f"{path} cannot be read: {wrong.strerror or wrong}") from None

    def text(self, stream: IO[bytes], path: str) -> Iterator[Document]:
        line, rest = 1, b""
        for piece in range(1, sys.maxsize):
            block = rest + stream.read(PIECE_BYTES - len(rest))
            cut = len(block) if len(block) < PIECE_BYTES else _border(block)
            block, rest = block[:cut], block[cut:]
            if block:
                yield Document(self.decode(block, path, line), path, piece)
                line += block.count(b"\n")
            elif not rest:
                return

    def decode(self, block: bytes, path: str, line: int) -> str:
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError:
            for number, part in enumerate(block.split(b"\n"), start=line):
                try:
                    part.decode("utf-8")
                except UnicodeDecodeError as wrong:
                    reason = f"byte 0x{part[wrong.start]:02x} at place {wrong.start + 1} is not UTF-8"
                    self.problem(path, number, "line", reason, kept=True)
            return block.decode("utf-8", "replace")

    def lines(self, stream: IO[bytes], path: str) -> Iterator[Document]:
        number, name = 0, self.config.field
        while True:
            number += 1
            try:
                line = stream.readline(LONGEST_LINE_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as wrong:
                self.problem(path, number, "line", f"the compressed stream is broken here: {wrong}")
                return
            if not line:
                return
            if len(line) == LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                while len(stream.readline(LONGEST_LINE_BYTES)) == LONGEST_LINE_BYTES:
                    pass
                self.problem(path, number, "line", f"longer than {LONGEST_LINE_BYTES} bytes")
            elif not line.isspace():
                yield from self.json_line(line, path, number, name)

    def json_line(self, line: bytes, path: str, number: int, name: str) -> Iterator[Document]:
        undecodable = ""
        try:
            value = json.loads(line)
        except UnicodeDecodeError as wrong:
            undecodable = f"byte 0x{line[wrong.start]:02x} at place {wrong.start + 1} is not UTF-8"
            try:
                value = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError) as wrong:
                return self.problem(path, number, "line", f"not JSON: {wrong}")
        except (ValueError, RecursionError) as wrong:
            return self.problem(path, number, "line", f"not JSON: {wrong}")
        text = value.get(name) if isinstance(value, dict) else None
        if not isinstance(text, str):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            return self.problem(path, number, "line", f"no text in the field {name!r}, found {found}")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON may escape half a surrogate pair
            undecodable = "half a surrogate pair"
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if undecodable:
            self.problem(path, number, "line", undecodable, kept=True)
        yield from _pieces(text, path, number)

    def parquet(self, path: str) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        number, column = 0, self.config.column
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                if column not in table.schema_arrow.names:
                    raise CorpusError(
                        f"{path} has no column {column!r}, found {', '.join(table.schema_arrow.names)}",
                        hint="name the column with --column",
                    )
                for batch in table.iter_batches(batch_size=256, columns=[column]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if isinstance(text, str):
                            yield from _pieces(text, path, number)
                        else:
                            self.problem(path, number, "row", f"no text in the column {column!r}")
        except (pyarrow.ArrowException, UnicodeDecodeError) as wrong:
            reason = str(wrong).strip().splitlines()[:1]
            self.problem(path, number + 1, "row", f"cannot be read as parquet: {' '.join(reason)}")


def documents(
    config: CorpusConfig, progress: Progress = Progress(), tally: Tally | None = None
) -> Generator[Document, None, None]:
    """The documents of a corpus in order, empty ones left out; what could not be read is counted in `tally`.

    Raises CorpusError for a missing or empty corpus, an unknown column, and with `strict` for any unreadable place.
    """
    reader = _Reader(config, progress, Tally() if tally is None else tally)
    found = False
    for path in files(config):
        for document in reader.file(path):
            if document.text:
                found = True
                yield document
    counted = reader.tally
    if counted.malformed or counted.undecodable:
        progress.say(f"corpus: {counted.malformed} places left out, {counted.undecodable} read with U+FFFD")
    if not found:
        raise CorpusError(
            f"the corpus {' '.join(config.sources)} holds no text",
            hint="check the files, --field and --column" if counted.malformed else "",
        )


def files(config: CorpusConfig) -> list[str]:
    """Every file of the corpus, each once, sources in the order given, folders and globs sorted; `-` is kept as it is.

    Raises CorpusError where a source names nothing.
    """
    found: dict[str, None] = {}
    for source in config.sources:
        paths = _expand(source, config)
        if not paths:
            raise CorpusError(
                f"the corpus source {source!r} names no readable file",
                hint="folders are searched for " + ", ".join((*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX))
                + (f", {', '.join(config.suffixes)}" if config.suffixes else "; add others with --suffix"),
            )  # fmt: skip
        found.update(dict.fromkeys(paths))
    if not found:
        raise CorpusError("the corpus has no source", hint="name files, folders, globs, or - for standard input")
    return list(found)


def _expand(source: str, config: CorpusConfig) -> list[str]:
    if source == STDIN:
        return [source]
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, config)
    if path.exists():
        return [str(path)]
    out: list[str] = []
    for name in sorted(glob.glob(str(path), recursive=True)):
        out += _folder(Path(name), config) if os.path.isdir(name) else [name]
    return out


def _folder(folder: Path, config: CorpusConfig) -> list[str]:
    wanted = (*TEXT_SUFFIXES, *LINE_SUFFIXES, PARQUET_SUFFIX, *(s.lower() for s in config.suffixes))
    out = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        out += [os.path.join(here, n) for n in names if not n.startswith(".") and n.lower().endswith(wanted)]
    return sorted(out)


def _pieces(text: str, path: str, number: int) -> Iterator[Document]:
    """One document, or several where the text is too large for one."""
    if len(text) * 4 <= PIECE_BYTES or len(block := text.encode()) <= PIECE_BYTES:
        yield Document(text, path, number)
        return
    while block:
        cut = len(block) if len(block) <= PIECE_BYTES else _border(block[:PIECE_BYTES])
        yield Document(block[:cut].decode(), path, number)
        block = block[cut:]


def _border(block: bytes) -> int:
    """Where to cut a full block: after the last empty line, else the last line, else before a started character."""
    for mark in (b"\n\n", b"\n"):
        at = block.rfind(mark, len(block) // 2)
        if at >= 0:
            return at + len(mark)
    at = len(block)
    while at > len(block) - 4 and block[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if block[at - 1] >= 0xC0 else len(block)


def _open(path: str) -> IO[bytes]:
    if path.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.lower().endswith(".zst"):
        return io.BufferedReader(ZstdStream(open(path, "rb")), 1 << 20)  # the stream owns and closes the file
    return open(path, "rb", buffering=1 << 20)
