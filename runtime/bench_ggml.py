"""ggml's own gather, `ggml_get_rows`, through the C API that the wheel xllamacpp exports: the peer for GGUF rows."""

from __future__ import annotations

import ctypes
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.kernels.codecs import Bytes, find_codec
from engram.runtime.bench_race import BenchError, Contender, Ints

TYPES = {"q8_0": 8, "q4_0": 2, "iq4_nl": 20, "f32": 0, "bf16": 30}  # codec: ggml's number
_I32 = 26
_SPARE = 1 << 20  # bytes of a context beside its tensors
_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_size_t), ("buffer", _P), ("no_alloc", ctypes.c_bool)]


_FUNCTIONS = {
    "ggml_init": (_P, (_Parameters,)), "ggml_free": (None, (_P,)), "ggml_get_data": (_P, (_P,)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _N)), "ggml_new_tensor_2d": (_P, (_P, _I, _N, _N)),
    "ggml_get_rows": (_P, (_P, _P, _P)), "ggml_new_graph": (_P, (_P,)),
    "ggml_build_forward_expand": (None, (_P, _P)), "ggml_graph_compute_with_ctx": (_I, (_P, _P, _I)),
    "ggml_row_size": (ctypes.c_size_t, (_I, _N)),
}  # fmt: skip


def library() -> Any:
    """The loaded library. Raises BenchError where xllamacpp is not installed or exports another API."""
    found = util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        raise BenchError("ggml cannot be used: xllamacpp is not installed", hint="pip install xllamacpp")
    for file in sorted(Path(found.submodule_search_locations[0]).glob("*.so")):
        loaded = ctypes.CDLL(str(file))
        if all(hasattr(loaded, name) for name in _FUNCTIONS):
            for name, (result, arguments) in _FUNCTIONS.items():
                getattr(loaded, name).restype, getattr(loaded, name).argtypes = result, list(arguments)
            return loaded
    raise BenchError("ggml cannot be used: this xllamacpp does not export its C API")


class Table:
    """A table in ggml's memory, one graph for each batch size; `bytes_NK` shows the same memory to others."""

    def __init__(self, codec: str, block_NK: Bytes, rows: int, width: int) -> None:
        self._ggml, self.width = library(), width
        self.codec = find_codec(codec)
        row_bytes = block_NK.shape[1]
        if self._ggml.ggml_row_size(TYPES[codec], width) != row_bytes:
            raise BenchError(f"ggml stores rows of {codec} otherwise than in {row_bytes} bytes")
        self._contexts = [self._ggml.ggml_init(_Parameters(rows * row_bytes + _SPARE, None, False))]
        if not self._contexts[0]:
            raise BenchError(f"ggml cannot take {rows * row_bytes:,} bytes of memory")
        self._tensor = self._ggml.ggml_new_tensor_2d(self._contexts[0], TYPES[codec], width, rows)
        self.bytes_NK: Bytes = self._array(self._tensor, ctypes.c_uint8, (rows, row_bytes))
        for begin in range(0, rows, len(block_NK)):
            self.bytes_NK[begin : begin + len(block_NK)] = block_NK[: rows - begin]
        self._graphs: dict[int, tuple[Any, Any, NDArray[np.int32], NDArray[np.float32]]] = {}

    def _array(self, tensor: Any, kind: Any, shape: tuple[int, ...]) -> Any:
        data = ctypes.cast(self._ggml.ggml_get_data(tensor), ctypes.POINTER(kind))
        return np.ctypeslib.as_array(data, shape)

    def _graph(self, count: int) -> tuple[Any, Any, NDArray[np.int32], NDArray[np.float32]]:
        if count not in self._graphs:
            context = self._ggml.ggml_init(_Parameters(count * (4 * self.width + 4) + 64 * count + _SPARE, None, False))
            self._contexts.append(context)
            ids = self._ggml.ggml_new_tensor_1d(context, _I32, count)
            out = self._ggml.ggml_get_rows(context, self._tensor, ids)
            graph = self._ggml.ggml_new_graph(context)
            self._ggml.ggml_build_forward_expand(graph, out)
            self._graphs[count] = (
                context, graph, self._array(ids, ctypes.c_int32, (count,)),
                self._array(out, ctypes.c_float, (count, self.width)),
            )  # fmt: skip
        return self._graphs[count]

    def contender(self, most_rows: int) -> Contender:
        """get_rows with one thread; its work buffer is made by ggml in every call, as its C API offers it."""

        def call(ids: Ints) -> NDArray[Any]:
            context, graph, wanted, out = self._graph(len(ids))
            wanted[:] = ids
            self._ggml.ggml_graph_compute_with_ctx(context, graph, 1)
            return out

        def truth(ids: Ints) -> NDArray[Any]:
            return self.codec.decode(np.ascontiguousarray(self.bytes_NK[ids]), self.width)

        return Contender("ggml get_rows", call, truth, most_rows=most_rows)

    def close(self) -> None:
        """Give ggml's memory back; neither the table nor its bytes may be used afterwards."""
        for context in self._contexts:
            self._ggml.ggml_free(context)
        self._contexts.clear()
        self._graphs.clear()
