"""What tensors a foreign checkpoint holds and where their bytes lie: from headers alone, nothing trusted. No torch.

A checkpoint is a folder of safetensors shards (with or without an index), one safetensors file, or one GGUF file. A
header comes from strangers: every number in it is compared with the file before it is used, so that a lie ends in a
TensorFileError, not in a wrong row, a loop or an allocation.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engram import EngramError
from engram.builders.gguf_header import read_places

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes: what the safetensors library reads at most
MOST_DIMENSIONS = 8
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip
_LARGEST, _LARGEST_INDEX = (1 << 63) - 1, 1 << 28
_FETCH = "it is truncated, altered or another kind of file: fetch it again"


class TensorFileError(EngramError):
    """A checkpoint whose headers cannot be read, contradict themselves or do not fit their files."""


class Tensor(NamedTuple):
    """One tensor's bytes: `bytes` of them at `offset` of `file`, the last dimension of `shape` the fastest.

    `dtype` is safetensors' name, or ggml's of a GGUF ("Q4_0").
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class TensorFiles:
    """All tensors by name, and the names that an index says are in shards which are not there (`absent`, by shard)."""

    path: Path
    tensors: Mapping[str, Tensor]
    absent: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of a GGUF

    def find(self, name: str) -> Tensor:
        """One tensor; TensorFileError where there is none, or where its shard is missing."""
        if name in self.tensors:
            return self.tensors[name]
        if name in self.absent:
            raise TensorFileError(
                f"tensor {name!r} is in {self.path / self.absent[name]}, which is not there", hint="fetch that shard"
            )
        raise TensorFileError(f"{self.path} holds no tensor {name!r}")

    @property
    def total_bytes(self) -> int | None:
        """Of all tensors that are here; None where nobody says it."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def open_files(path: Path) -> TensorFiles:
    """Read the headers of a checkpoint folder or file. Shards that an index names may be missing.

    Raises TensorFileError for everything that is not consistent.
    """
    if path.is_dir():
        with uncollected():
            return _folder(path)
    if path.suffix == ".gguf":
        metadata, places = read_places(path)
        tensors = {name: Tensor(path, *place) for name, place in places.items()}
        return TensorFiles(path, tensors, metadata=metadata)
    if path.suffix == ".safetensors":
        return TensorFiles(path, read_header(path))
    raise TensorFileError(
        f"{path} is no checkpoint", hint="give a folder with .safetensors files, one .safetensors or one .gguf file"
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: a hundred thousand tensors make no cycles, and would be looked at again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _folder(folder: Path) -> TensorFiles:
    index = folder / INDEX
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise TensorFileError(f"{folder} holds no .safetensors file", hint="give the folder of the weights")
        return TensorFiles(folder, _joined(found))
    if index.stat().st_size > _LARGEST_INDEX:
        raise TensorFileError(f"{index} has {index.stat().st_size:,} bytes, no index is that large")
    weight_map, _ = check_index(index, index.read_bytes())
    here = {shard for shard in dict.fromkeys(weight_map.values()) if (folder / shard).is_file()}
    tensors = _joined((folder / shard for shard in sorted(here)), weight_map)
    absent = {name: shard for name, shard in weight_map.items() if name not in tensors}
    check_held(index, absent, here)
    return TensorFiles(folder, tensors, absent)


def _joined(paths: Iterable[Path], weight_map: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of all files, each in one file only, and in the one that `weight_map` names."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        join(tensors, path, read_header(path), weight_map)
    return tensors


def join(
    tensors: dict[str, Tensor], path: Path, found: Mapping[str, Tensor], weight_map: Mapping[str, str] | None = None
) -> None:
    """Put what one shard holds to what others hold, as `_joined` says; TensorFileError where that contradicts."""
    shard = path.name
    for name, tensor in found.items():
        if name in tensors:
            raise TensorFileError(f"tensor {name!r} is in {tensors[name].file} and in {path}")
        if weight_map is not None and weight_map.get(name, shard) != shard:
            said = weight_map[name]
            raise TensorFileError(f"{path.parent / INDEX} says that {name!r} is in {said}, it is in {shard}")
        tensors[name] = tensor


def check_held(index: Path, lacking: Mapping[str, str], read: Collection[str]) -> None:
    """Refuse an index where a shard that was read lacks a tensor (`lacking`: name → shard)."""
    for name, shard in lacking.items():
        if shard in read:
            raise TensorFileError(f"{index} says that {shard} holds {name!r}, it does not", hint="fetch it again")


def check_index(path: Path, raw: bytes) -> tuple[dict[str, str], int | None]:
    """Tensor name → file name, which stays inside the folder; the bytes of all tensors, where the index says them."""
    try:
        index = json.loads(raw, object_pairs_hook=_no_twice)
        pairs = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as wrong:
        raise TensorFileError(f"{path} is no index with a weight_map: {wrong!r}") from None
    for name, shard in pairs.items():
        if not isinstance(shard, str):
            raise TensorFileError(f"{path} says that {name!r} is in {shard!r}: a shard is a file beside the index")
    for shard in set(pairs.values()):
        if Path(shard).name != shard or "\\" in shard or shard in (".", "..", ""):
            raise TensorFileError(f"{path} names the shard {shard!r}: a shard is a file beside the index")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return pairs, total if type(total) is int and 0 <= total <= _LARGEST else None


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked: inside the file, none over another, no byte unaccounted for."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            text = file.read(header_length(path, file.read(8), size))
    except OSError as wrong:
        raise TensorFileError(f"{path} cannot be read: {wrong.strerror}") from None
    return check_header(path, text, size)


def header_length(path: Path, first: bytes, size: int, most: int = LONGEST_HEADER) -> int:
    """Bytes of the header behind a file's `first` 8 bytes, of `size` in all; TensorFileError where that cannot be."""
    length = int.from_bytes(first, "little")
    if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
        raise TensorFileError(f"{path} states a header of {length:,} bytes, the file has {size:,}", hint=_FETCH)
    if length > most:
        raise TensorFileError(f"{path} states a header of {length:,} bytes, at most {most:,} are read from a server")
    return length


def check_header(path: Path, text: bytes, size: int) -> dict[str, Tensor]:
    """What `read_header` gives, of a header's bytes and the `size` of the whole file."""
    length = len(text)
    try:
        entries = json.loads(text, object_pairs_hook=_no_twice)
    except (ValueError, RecursionError) as wrong:
        raise TensorFileError(f"{path} has a header that is no JSON: {str(wrong)[:200]}") from None
    if not isinstance(entries, dict):
        raise TensorFileError(f"{path} has a header that is no JSON object")
    entries.pop("__metadata__", None)
    found = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    reached, last = 8 + length, ""
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != reached:
            what = f"overlaps {last!r}" if tensor.offset < reached else "leaves a gap before it"
            raise TensorFileError(f"{path}: tensor {name!r} {what}")
        reached, last = tensor.offset + tensor.bytes, name
    if reached != size:
        raise TensorFileError(f"{path} has {size:,} bytes, its tensors end at {reached:,}", hint="fetch it again")
    return found


def _tensor(path: Path, name: str, entry: Any, begin: int, size: int) -> Tensor:
    """One entry of a header, its numbers compared with each other and with the file."""
    try:
        dtype, shape, (first, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise TensorFileError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise TensorFileError(f"{path}: tensor {name!r} has the dtype {dtype!r}, safetensors knows {', '.join(BITS)}")
    numbers = (*shape, first, end)
    sound = len(shape) <= MOST_DIMENSIONS
    for number in numbers:
        sound = sound and type(number) is int and 0 <= number <= _LARGEST
    if not sound:
        raise TensorFileError(f"{path}: tensor {name!r} has a shape or offsets that cannot be: {entry!r:.200}")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - first != bits // 8:
        raise TensorFileError(
            f"{path}: tensor {name!r} of {dtype} {list(shape)} needs {bits / 8:,.10g} bytes, its offsets span "
            f"{end - first:,}"
        )
    if begin + end > size:
        raise TensorFileError(
            f"{path}: tensor {name!r} ends at byte {begin + end:,}, the file has {size:,}", hint="fetch it again"
        )
    return Tensor(path, dtype, shape, begin + first, end - first)


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r:.100} occurs twice")
    return found
