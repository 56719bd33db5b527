"""The C++ extension; arguments are NumPy arrays, positions as in kernels/cpu.py and quantize/mapped.py."""

from typing import Any

from numpy.typing import NDArray

def gather(codec: int, table: NDArray[Any], rows: NDArray[Any], out: NDArray[Any], width: int, threads: int) -> int: ...
def copy_rows(table: NDArray[Any], rows: NDArray[Any], out: NDArray[Any], threads: int) -> int: ...
def row_bytes(codec: int, width: int) -> int: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def use_isa(name: str) -> bool: ...
def available_threads() -> int: ...
def scatter_add(rows: NDArray[Any], values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]: ...
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
