"""What every published memory has in common once its family file has read it: tables, gates, constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram.builders.families.config import FamilyError
from engram.builders.tensor_files import Tensor, TensorFiles
from engram.kernels.codecs import find_codec

FLOATS = {"BF16": "bf16", "F32": "f32"}  # dtypes of plain rows → our codec; F32 is what transformers saves in float32
GGML = {"Q8_0": "q8_0", "Q4_0": "q4_0", "IQ4_NL": "iq4_nl", **FLOATS}  # ggml's types that are row codecs of ours


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a table: `values` [rows, width], and `scales` [rows, …] where they are apart."""

    first_row: int
    rows: int
    values: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class Table:
    """One layer's rows.

    `dtype` is what its values are stored in; `codec` our row codec whose row is a row of values followed by its scales,
    None where there is none. `factor` is the one number that multiplies all rows, where the codec needs one. `absent`:
    shards that hold parts of it and are not there.
    """

    layer: int
    dtype: str
    codec: str | None
    rows: int
    width: int
    parts: tuple[Part, ...]
    absent: tuple[str, ...] = ()
    factor: Tensor | None = None

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
    def row_bytes(self) -> float:
        """Bytes of a row with its scales, where they are stored by the row."""
        for part in self.parts:
            return (part.values.bytes + (part.scales.bytes if part.scales else 0)) / part.rows
        return float(find_codec(self.codec).row_bytes(self.width)) if self.codec else 0.0

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its rows, as far as they are there."""
        tensors = [tensor for part in self.parts for tensor in (part.values, part.scales) if tensor is not None]
        return tuple(dict.fromkeys(tensor.file for tensor in tensors))


@dataclass(frozen=True)
class Published:
    """A checkpoint of a known family, from its headers and config.json alone.

    `hashing`: the dialect's constants as `Layout.build` takes them, but the token map, which a tokenizer makes;
    `compressed_size` is what that map must come to. `stored`: hash constants that the checkpoint itself holds, as
    "LAYER.multipliers", "LAYER.primes", "LAYER.offsets". `dense`: by layer, the gate's tensors by our parameter name.
    `absent`: of both, those in shards that are not there. `vocab_size` is 0 where only the tokenizer says it.
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
    absent: tuple[str, ...] = ()

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


Wanted = tuple[str, tuple[int, ...] | None, tuple[str, ...]]  # name, shape (None: any), dtypes (none: any)


def expect_here(files: TensorFiles, wanted: Mapping[str, Wanted]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Those of some tensors whose shards are here, each checked, and the names of the others."""
    found = {}
    for key, (name, shape, dtypes) in wanted.items():
        if name not in files.absent:
            found[key] = files.find(name) if shape is None else expect(files, name, shape, dtypes)
    return found, tuple(name for name, _, _ in wanted.values() if name in files.absent)


def prefix_of(files: TensorFiles, ending: str) -> str:
    """What stands before `ending` in the one tensor name that ends so; FamilyError where that is not one prefix."""
    found = {name.removesuffix(ending) for name in (*files.tensors, *files.absent) if name.endswith(ending)}
    if len(found) != 1:
        raise FamilyError(
            f"{files.path} has {len(found)} tensors named …{ending}: {', '.join(sorted(found)) or 'none'}"
        )
    return found.pop()
