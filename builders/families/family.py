"""What every published memory has in common once its family file has read it: tables, gates, constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engram.builders.families.config import FamilyError
from engram.builders.tensor_files import Tensor, TensorFiles
from engram.kernels.codecs import find_codec

FLOATS = {"BF16": "bf16", "F32": "f32"}  # dtypes of plain rows → our codec; F32 is what transformers saves in float32


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a table: `values` [rows, width], and `scales` [rows, …] where they are apart."""

    first_row: int
    rows: int
    values: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class Table:
    """One layer's rows. `codec`: our row codec whose row is a row of values followed by its scales.

    `absent`: shards that hold parts of it and are not there.
    """

    layer: int
    codec: str
    rows: int
    width: int
    parts: tuple[Part, ...]
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that are not the rows of the table, each once."""
        reached = 0
        for part in self.parts:
            if part.first_row != reached and not self.absent:
                raise FamilyError(f"layer {self.layer}: rows from {part.first_row:,} on follow row {reached:,}")
            reached = part.first_row + part.rows
        if not self.absent and reached != self.rows:
            raise FamilyError(f"layer {self.layer} stores {reached:,} rows, its configuration asks for {self.rows:,}")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its scales."""
        return find_codec(self.codec).row_bytes(self.width)


@dataclass(frozen=True)
class Published:
    """A checkpoint of a known family, from its headers and config.json alone.

    `hashing`: the dialect's constants as `Layout.build` takes them, but the token map, which a tokenizer makes;
    `compressed_size` is what that map must come to. `stored`: hash constants that the checkpoint itself holds.
    `dense`: by layer, the gate's tensors by our parameter name.
    """

    family: str
    dialect: str
    orders: tuple[int, ...]
    heads: int
    head_dim: int
    tables: tuple[Table, ...]
    vocab_size: int
    hashing: Mapping[str, Any]
    compressed_size: int | None = None
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    dense: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Rows that one token reads in one layer."""
        return len(self.orders) * self.heads


def expect(files: TensorFiles, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
    """A tensor of exactly this shape and one of these dtypes."""
    tensor = files.find(name)
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise FamilyError(
            f"{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}, config.json asks for "
            f"{' or '.join(dtypes)} {list(shape)}"
        )
    return tensor


def prefix_of(files: TensorFiles, ending: str) -> str:
    """What stands before `ending` in the one tensor name that ends so; FamilyError where that is not one prefix."""
    found = {name.removesuffix(ending) for name in (*files.tensors, *files.absent) if name.endswith(ending)}
    if len(found) != 1:
        raise FamilyError(
            f"{files.path} has {len(found)} tensors named …{ending}: {', '.join(sorted(found)) or 'none'}"
        )
    return found.pop()
