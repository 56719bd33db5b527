"""The importance matrix: how large each input of a backbone's linear layers is over a user's text; kept as GGUF.

The file is the one that llama.cpp's own tools write and read: general.type "imatrix", and for a tensor `NAME` of K
inputs `NAME.in_sum2` float32 [1, K], sums of squares, and `NAME.counts` float32 [1, 1], the rows that were summed.

It is collected by hooks on the transformers model rather than llama.cpp's evaluation callback: so the memory takes
part, as it will when the backbone is used. llama.cpp permutes rows of some weights but never inputs, so the numbers
carry over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.builders.gguf_header import GgufHeaderError, read_metadata

_SUMS, _COUNTS = ".in_sum2", ".counts"


class ImportanceError(EngramError):
    """An importance matrix that is empty, damaged, or for a backbone that GGUF has no names for."""


@dataclass(frozen=True)
class Importance:
    """GGUF tensor name → mean squared value of each input, float32 [K]; and the rows of text behind it."""

    means: dict[str, NDArray[np.float32]]
    counts: dict[str, int] = field(default_factory=dict)


class Collector:
    """Hooks on a transformers backbone: whatever is run inside the `with` block is counted.

    Shape letters: R rows (positions), K inputs of a layer.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.rows: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        from torch import nn

        for name, module in self.backbone.named_modules():
            if isinstance(module, nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._counter(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _counter(self, name: str) -> Any:
        import torch

        def count(module: Any, inputs: tuple[Any, ...]) -> None:
            rows_RK = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            found = rows_RK.square().sum(dim=0, dtype=torch.float64).cpu().numpy()
            self.sums[name] = self.sums[name] + found if name in self.sums else found
            self.rows[name] = self.rows.get(name, 0) + len(rows_RK)

        return count

    def importance(self, gguf: Path) -> Importance:
        """What was counted, under the tensor names of a GGUF file of the same backbone.

        Raises ImportanceError where nothing was counted or the file's architecture has no known names.
        """
        names = _tensor_names(gguf, list(self.sums))
        if not names:
            raise ImportanceError(
                f"nothing was counted for {gguf}", hint="run text through the backbone inside the `with` block"
            )
        means = {new: (self.sums[old] / self.rows[old]).astype(np.float32) for old, new in names.items()}
        return Importance(means, {new: self.rows[old] for old, new in names.items()})


def _tensor_names(gguf: Path, modules: list[str]) -> dict[str, str]:
    """transformers module → GGUF tensor, through the name map of the gguf package."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    meta = read_metadata(gguf)
    architecture = meta.get("general.architecture")
    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ImportanceError(f"{gguf} has the architecture {architecture!r}, for which no tensor names are known")
    table = get_tensor_name_map(known[architecture], int(meta.get(f"{architecture}.block_count", 0)))
    found = {module: table.get_name(module) for module in modules}
    return {module: f"{name}.weight" for module, name in found.items() if name}


def write_importance(path: Path, importance: Importance, datasets: list[str], chunk: int = 512) -> None:
    """Write the matrix as llama.cpp's imatrix GGUF. `datasets` names the texts, `chunk` the positions of one run."""
    from gguf import GGUFWriter

    partial = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial, "")
    try:
        _fill(writer, importance, datasets, chunk)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _fill(writer: Any, importance: Importance, datasets: list[str], chunk: int) -> None:
    writer.kv_data[0].pop("general.architecture", None)  # an imatrix has none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", datasets or [""])
    most = max(importance.counts.values(), default=0)
    writer.add_uint32("imatrix.chunk_count", max(1, most // chunk))
    writer.add_uint32("imatrix.chunk_size", chunk)
    for name, means in importance.means.items():
        rows = importance.counts.get(name, 1)
        writer.add_tensor(name + _SUMS, (means.astype(np.float64) * rows).astype(np.float32).reshape(1, -1))
        writer.add_tensor(name + _COUNTS, np.full((1, 1), rows, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_importance_target(path: Path, *, force: bool) -> None:
    """Make the folder of a matrix to come. ImportanceError where something is there, or with `force` no matrix."""
    if path.exists() and not force:
        raise ImportanceError(
            f"{path} exists", hint=f"use it with --importance {path}, or pass --force to make another"
        )
    if path.is_symlink() or path.exists() and not (path.is_file() and _is_matrix(path)):
        raise ImportanceError(f"{path} is no importance matrix, --force does not replace it", hint="remove it yourself")
    path.parent.mkdir(parents=True, exist_ok=True)


def _is_matrix(path: Path) -> bool:
    try:
        return read_metadata(path).get("general.type") == "imatrix"
    except GgufHeaderError:
        return False


def importance_texts(path: Path) -> list[str]:
    """The texts that a matrix says it was made of. Raises GgufHeaderError for a file that is no GGUF."""
    return [str(text) for text in read_metadata(path).get("imatrix.datasets", [])]


def read_importance(path: Path) -> Importance:
    """Read an imatrix GGUF, ours or llama.cpp's. Raises ImportanceError for a damaged, empty or non-finite one."""
    from gguf import GGUFReader

    try:
        if read_metadata(path).get("general.type") != "imatrix":
            raise ImportanceError(f"{path} is no importance matrix: its general.type is not 'imatrix'")
        tensors = {t.name: np.array(t.data, dtype=np.float32) for t in GGUFReader(path).tensors}
    except (GgufHeaderError, ValueError, KeyError, IndexError) as wrong:
        raise ImportanceError(f"importance matrix {path} cannot be read: {wrong}", hint="collect it again") from None
    means, rows = {}, {}
    for key, sums in tensors.items():
        name = key.removesuffix(_SUMS)
        if key == name:
            continue
        counts = tensors.get(name + _COUNTS)
        if counts is None or not np.isfinite(sums).all() or not (counts > 0).all() or sums.size % counts.size:
            raise ImportanceError(f"importance matrix {path}: {name} has no counts, or values that are not finite")
        means[name] = (sums.reshape(counts.size, -1) / counts.reshape(-1, 1)).ravel()
        rows[name] = int(counts.max())
    if not means:
        raise ImportanceError(f"importance matrix {path} holds no tensor")
    return Importance(means, rows)
