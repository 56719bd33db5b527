"""The C++ extension; arguments are NumPy arrays, positions as in kernels/cpu.py and quantize/mapped.py."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def gather(
    code: int, factor: float, table: NDArray[Any], rows: NDArray[Any], out: NDArray[Any], width: int, threads: int
) -> int: ...
def copy_rows(table: NDArray[Any], rows: NDArray[Any], out: NDArray[Any], threads: int) -> int: ...
def row_bytes(codec: int, width: int) -> int: ...
def can_encode(codec: int) -> bool: ...
def encode(codec: int, rows: NDArray[Any], out: NDArray[Any], threads: int) -> bool: ...
def row_errors(
    codec: int,
    factor: float,
    encoded: NDArray[Any],
    rows: NDArray[Any],
    lost: NDArray[Any],
    whole: NDArray[Any],
    threads: int,
) -> None: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> bool: ...
def available_threads() -> int: ...
def scatter_add(rows: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]: ...
def split_rows(
    records: NDArray[Any], rows: NDArray[Any], places: NDArray[Any], ranks: NDArray[Any]
) -> list[int] | int: ...
def crc32_pages(pages: NDArray[Any], out: NDArray[Any], tables: bool) -> None: ...

class Hasher:
    def __init__(
        self,
        *,
        token_map: NDArray[Any] | None,
        vocab_size: int,
        negative_ids: bool,
        orders: list[int],
        heads: int,
        multipliers: list[list[int]],
        primes: list[list[int]],
        offsets: list[list[int]],
        dead_ids: list[int],
        dead_negative: bool,
        reset_id: int | None,
        fill: int,
        sums: bool,
        oldest_first: bool,
    ) -> None: ...
    def rows(
        self,
        ids: NDArray[Any],
        start: NDArray[Any] | None,
        past_ids: NDArray[Any],
        past_start: NDArray[Any],
        past_stop: NDArray[Any],
        layers: list[int],
        local: bool,
        out: list[NDArray[Any]],
    ) -> int: ...

PAGE_WAYS: tuple[str, ...]

class PageTicket:
    """Rows that were asked for."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""

class PageReader:
    """Rows of files; quantize/page_reader.py says what each call does, in its protocol of the same name."""

    def ask(self, rows: NDArray[np.int64]) -> PageTicket | int: ...
    def take(
        self,
        ticket: PageTicket,
        out: NDArray[np.float32] | NDArray[np.uint16],
        code: int,
        factor: float,
        width: int,
        threads: int,
        begin: int,
        end: int,
        /,
    ) -> tuple[str, int, int] | None: ...
    def copy(
        self, ticket: PageTicket, out: NDArray[np.uint8], threads: int, begin: int, end: int, /
    ) -> tuple[str, int, int] | None: ...
    def pieces(self, ticket: PageTicket, folios: int, /) -> list[int]: ...
    def trim(self) -> None: ...
    def set_bounded(self, bounded: bool, /) -> None: ...
    def mark_verified(self) -> None: ...
    def withdraw(self) -> None: ...
    @property
    def blocks_asked(self) -> int: ...

def open_pages(
    way: str,
    files: Sequence[tuple[int, int]],
    runs: Sequence[tuple[int, int, int, int]],
    parts: Sequence[Sequence[tuple[int, int, int, int, int, int, int]]],
    rows: int,
    sums: tuple[int, int, int],
    verify: bool,
    /,
) -> PageReader:
    """A reader that goes this way; RuntimeError where the system cannot, ValueError where this build does not."""

class MemoryGate:
    def __init__(
        self,
        key_weight: NDArray[Any],
        key_bias: NDArray[Any] | None,
        value_weight: NDArray[Any],
        value_bias: NDArray[Any] | None,
        query_norm: NDArray[Any],
        key_norm: NDArray[Any],
        eps: float,
        kind: int,
        conv_norm: NDArray[Any] | None,
        conv_weight: NDArray[Any] | None,
        dilation: int,
        conv_eps: float,
        /,
    ) -> None: ...
    def step(
        self,
        hidden: NDArray[Any],
        memory: NDArray[Any],
        past: NDArray[Any] | None,
        mask: NDArray[Any] | None,
        out: NDArray[Any],
        inputs: NDArray[Any] | None,
        /,
    ) -> None: ...

class EvalFilter:
    def __init__(
        self,
        names: Sequence[str],
        width: int,
        hit: Callable[[int, int, NDArray[np.float32] | None], object],
    ) -> None: ...
    @property
    def callback(self) -> int: ...
    @property
    def user_data(self) -> int: ...
    @property
    def asked(self) -> int: ...
    def handled(self, place: int, /) -> int: ...
    def handled_all(self, rows: int, /) -> bool: ...
    def arm(
        self,
        place: int,
        gate: MemoryGate,
        memory: NDArray[np.float32],
        past: NDArray[np.float32] | None,
        inputs: NDArray[np.float32] | None,
        /,
    ) -> None: ...
    def expect(self, ids: NDArray[np.int32]) -> None: ...
    def take_error(self) -> BaseException | None: ...
