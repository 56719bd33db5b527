"""What every table gives its users, however its rows are stored; and the bound on the memory that tables share.

Shape letters: N rows asked for, D width, K bytes a row.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from engram import Progress
from engram.kernels import dispatch
from engram.kernels.codecs import Bytes, Codec, Floats
from engram.quantize.page_reader import FOLIO, Ints, Values

VERIFY = ("first-touch", "open", "off")


class Budget:
    """A bound on the bytes of table files that the process keeps mapped in, shared by the tables that it adopts.

    Rows are taken in pieces that can map in at most half of the bound; after each piece the process's resident file
    pages are read from the kernel, and once they grew by more than the other half, the mappings are emptied
    (MADV_DONTNEED; the page cache keeps what it likes). Memory is thus held to the bound, or to one folio a table where
    the bound is smaller than that.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self.trims = 0
        self._tables: list[RowTable] = []
        self._base = _resident_file_bytes()

    @property
    def folios(self) -> int:
        """Stretches of 2 MiB that a piece may touch."""
        return max(1, self.limit // FOLIO // 2)

    def adopt(self, table: RowTable) -> None:
        """Let this budget bound the table's mapping."""
        self._tables.append(table)
        table.set_budget(self)

    def settle(self) -> None:
        """Empty the mappings if they have grown beyond their half, or if the kernel does not tell."""
        now = _resident_file_bytes()
        self._base = min(self._base, now)
        if not now or now - self._base > self.limit // 2:
            for table in self._tables:
                table.trim()
            self.trims += 1
            self._base = _resident_file_bytes()


def _resident_file_bytes() -> int:
    """Resident pages of files and shared memory in this process; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(200).split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


class MemoryRows(Protocol):
    """Rows of a table in memory, as they are stored or decoded. Row ids must lie in the table."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""

    def gather(self, rows: Ints, out: Values, *, threads: int = 1) -> int:
        """Decode rows (int64 of any shape) into `out`, N * D float32 or uint16; returns the bytes that were stored."""


class OneCodecRows:
    """Rows in memory that all have one codec."""

    def __init__(self, codec: Codec, bytes_NK: Bytes, width: int) -> None:
        self.codec, self.bytes_NK, self.width = codec, bytes_NK, width
        self.nbytes = bytes_NK.nbytes
        self._row_bytes = int(bytes_NK.shape[1])

    def gather(self, rows: Ints, out: Values, *, threads: int = 1) -> int:
        """As MemoryRows says."""
        dispatch.ops().gather(self.codec, self.bytes_NK, rows, out, width=self.width, threads=threads)
        return int(rows.size) * self._row_bytes


class RowTable(ABC):
    """Rows of one table, wherever they lie and in whatever codecs. Threads may share it.

    `verify` says when the checksum of a page is compared: "first-touch" (before a row of it is first used), "open" (all
    of them in `open`) or "off". `io` names the way in which pages are read, `why` says why that one.
    """

    what = "table file"
    path: Path
    codec_name: str  # as the manifest says it
    rows: int
    width: int
    layer: int
    verify: str
    io: str
    why: str
    pages: int  # pages, or blocks of 4096 bytes, that rows lie on
    file_bytes: int  # of these and what describes them
    encoded_bytes: int  # memory that `in_memory` takes
    held_bytes: int = 0  # memory that the open table takes for itself, whatever is asked

    @property
    @abstractmethod
    def paths(self) -> list[Path]:
        """The files that it consists of."""

    @property
    @abstractmethod
    def pages_read(self) -> int:
        """Pages of 4096 bytes that the device was asked for."""

    @abstractmethod
    def ask(self, rows: Ints) -> Any:
        """Want rows, int64 of any shape; returns a ticket at once, while the device is asked in the background.

        Raises RowStoreError for an id outside the table; then nothing is asked for.
        """

    @abstractmethod
    def take(self, ticket: Any, out: Values, *, threads: int = 1) -> Values:
        """Wait for rows that were asked for and decode them into `out`: N * D values, float32 or uint16 (bf16 bits).

        A ticket may be taken from any number of times. Raises RowStoreError where a page does not match its checksum or
        a file was truncated, and for an `out` of another size or kind; what `out` holds is then undefined.
        """

    @abstractmethod
    def arrived(self, ticket: Any) -> bool:
        """Whether nothing need be waited for: every page was read before, or the device has delivered it."""

    def decode(self, rows: Ints, out: Values, *, threads: int = 1) -> Values:
        """`take` of `ask`."""
        return self.take(self.ask(rows), out, threads=threads)

    @abstractmethod
    def stored_bytes(self, ticket: Any, rows: int) -> int:
        """Bytes that the rows of a ticket, `rows` in number, take as they are stored."""

    @abstractmethod
    def check_ids(self, lowest: int, highest: int) -> None:
        """RowStoreError for row ids outside the table."""

    @abstractmethod
    def decoded_blocks(self, out: Floats | None = None) -> Iterator[tuple[int, Floats]]:
        """(first row, float32 rows [n, D]) of the whole table in order, read beside the mapping; always verified.

        They are parts of `out`, float32 [rows, D], where that is given.
        """

    @abstractmethod
    def in_memory(self, advance: Callable[[int], None]) -> MemoryRows:
        """All rows as they are stored, verified, in memory; tells `advance` how many more have come. MemoryError."""

    @abstractmethod
    def copy(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Write the table again, verified, into `tables/` of another folder; its entry of a manifest."""

    def part_entries(self) -> list[dict[str, Any]]:
        """What `parts` of a manifest must say of a mixed table's classes (files by name alone); [] for other tables."""
        return []

    @abstractmethod
    def seal(self) -> str:
        """SHA-256 of what pins every byte of the rows: headers and checksums."""

    @abstractmethod
    def verify_all(self) -> None:
        """Compare every checksum now; what is later read again is compared again only where the file changed."""

    @abstractmethod
    def set_budget(self, budget: Budget | None) -> None:
        """Bound the memory through which this process sees the files."""

    @abstractmethod
    def trim(self) -> None:
        """Give back the memory through which this process sees the files."""

    @abstractmethod
    def close(self) -> None:
        """Close the files; the table cannot be used afterwards. What a ticket still needs lives as long as it does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
