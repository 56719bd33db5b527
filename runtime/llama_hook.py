"""The residual stream of llama.cpp, read and rewritten where a graph computes it: its evaluation callback.

Names and shapes of tensors are no interface of llama.cpp: everything that is relied on is compared with the library's
own functions when a context is made (`check_tensor`), and a release that was never tried is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.kernels.reference import MemoryGate

TRIED = ("0.3.36",)  # releases of llama-cpp-python whose structures are those below
F32 = 0  # ggml_type


class LlamaError(EngramError):
    """A GGUF backbone that cannot be run through llama.cpp here, or a graph that is not the one expected."""


class Tensor(ctypes.Structure):
    """The beginning of a ggml_tensor, as far as it is read."""

    _fields_ = [
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    ]  # fmt: skip


@cache
def library() -> Any:
    """llama_cpp's low-level module, quiet. LlamaError where it is missing or of a release that was never tried."""
    try:
        import llama_cpp
    except ImportError as wrong:
        raise LlamaError(
            f"a GGUF backbone runs through llama.cpp, which cannot be imported: {wrong}",
            hint="pip install 'engram-lm[gguf]', or run it through torch: --engine torch",
        ) from None
    if llama_cpp.__version__ not in TRIED:
        raise LlamaError(
            f"llama-cpp-python {llama_cpp.__version__} was not tried, only {', '.join(TRIED)}",
            hint=f"pip install llama-cpp-python=={TRIED[-1]}, or run it through torch: --engine torch",
        )
    module = llama_cpp.llama_cpp
    _KEPT.append(module.llama_log_callback(lambda level, text, user: None))
    module.llama_log_set(_KEPT[-1], None)
    module.llama_backend_init()
    return module


def library_version() -> str:
    """The release of llama-cpp-python."""
    import llama_cpp

    return str(llama_cpp.__version__)


_KEPT: list[Any] = []  # callbacks that C may still call


@cache
def _function(name: str, result: Any) -> Any:
    """A function of ggml; found through libllama, whose dependency is already mapped."""
    found = getattr(library()._lib, name)
    found.restype, found.argtypes = result, [ctypes.c_void_p]
    return found


def tensor_at(address: int) -> Tensor:
    """The tensor at an address that a callback was given."""
    return Tensor.from_address(address)


def check_tensor(address: int) -> None:
    """Compare the structure's fields with what the library's functions say. LlamaError where they differ."""
    tensor = tensor_at(address)
    count = int(np.prod(list(tensor.ne)))
    said = _function("ggml_nelements", ctypes.c_int64)(address), _function("ggml_get_data", ctypes.c_void_p)(address)
    name = _function("ggml_get_name", ctypes.c_char_p)(address)
    if (count, tensor.data, tensor.name) != (*said, name):
        raise LlamaError(
            "this build of llama.cpp lays tensors out in another way than the one that was tried",
            hint="run it through torch: --engine torch",
        )


def rows_of(address: int, width: int) -> NDArray[np.float32]:
    """The rows [n, width] of a float32 tensor in this process's memory, to be read and written in place."""
    tensor = tensor_at(address)
    name = tensor.name.decode(errors="replace")
    host = _function("ggml_backend_buffer_is_host", ctypes.c_bool)(tensor.buffer) if tensor.buffer else True
    whole = _function("ggml_is_contiguous", ctypes.c_bool)(address)
    if tensor.type != F32 or not whole or not host or tensor.ne[0] != width:
        raise LlamaError(
            f"node {name} is of type {tensor.type} and width {tensor.ne[0]}, {'in' if host else 'outside'} this "
            f"process's memory: expected are contiguous float32 rows of {width}",
            hint="keep the layers on the CPU, or run it through torch: --engine torch",
        )
    count = int(np.prod(list(tensor.ne)[1:]))
    place = ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(place, shape=(count, width))


def integers_of(address: int) -> NDArray[np.int32]:
    """The elements of an int32 tensor, copied."""
    tensor = tensor_at(address)
    count = int(np.prod(list(tensor.ne)))
    place = ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_int32))
    return np.array(np.ctypeslib.as_array(place, shape=(count,)))


Singles = NDArray[np.float32]
Hit = Callable[[int, int, "Singles | None"], object]  # place of the name, address, rows


class Filter(Protocol):
    """Of a graph's nodes, those with one of some names are told to `hit` once they were computed.

    The first name is the node that looks token ids up: its ids are compared with those expected, and only others are
    told; of one id alone nothing is compared. Of the other nodes, `hit` gets the rows [n, width] to be read and written in place, where they are contiguous
    float32; None where they are not.
    """

    callback: Any  # for llama_context_params.cb_eval
    user_data: Any

    def expect(self, ids: NDArray[np.int32]) -> None:
        """The token ids of the batch that comes next, in order."""

    def arm(
        self, place: int, gate: MemoryGate, memory_BTE: Singles, past_BPX: Singles | None, inputs_BTX: Singles | None
    ) -> None:
        """When this node comes with B * T rows at once, let the gate rewrite them instead of calling `hit`.

        What the convolution reads later is written to `inputs`. Holds for the batch of the last `expect`.
        """

    def handled(self, place: int) -> int:
        """Rows of this batch dealt with without `hit`: ids that came as expected, rows that a gate rewrote."""

    def handled_all(self, rows: int) -> bool:
        """Whether that is so of this many rows of every node."""

    def take_error(self) -> BaseException | None:
        """What a hit raised first, once. Nothing is called any more until it was taken."""


class CFilter:
    """The filter in C++: Python is entered for wanted nodes alone."""

    def __init__(self, names: Sequence[str], width: int, hit: Hit) -> None:
        from engram.kernels import _C

        module = library()
        self._filter = _C.EvalFilter(list(names), width, hit)
        self.callback = ctypes.cast(self._filter.callback, module.ggml_backend_sched_eval_callback)
        self.user_data = self._filter.user_data

    def arm(
        self, place: int, gate: MemoryGate, memory_BTE: Singles, past_BPX: Singles | None, inputs_BTX: Singles | None
    ) -> None:
        """As Filter says."""
        from engram.kernels import cpu

        assert isinstance(gate, cpu.MemoryGate)
        self._filter.arm(place, gate.prepared, memory_BTE, past_BPX, inputs_BTX)

    def handled(self, place: int) -> int:
        """As Filter says."""
        return self._filter.handled(place)

    def handled_all(self, rows: int) -> bool:
        """As Filter says."""
        return self._filter.handled_all(rows)

    def expect(self, ids: NDArray[np.int32]) -> None:
        """As Filter says."""
        self._filter.expect(ids)

    def take_error(self) -> BaseException | None:
        """As Filter says."""
        return self._filter.take_error()


class PythonFilter:
    """The same, to be read: entered for every node."""

    def __init__(self, names: Sequence[str], width: int, hit: Hit) -> None:
        module = library()
        self._places = {name.encode(): place for place, name in enumerate(names)}
        self._width, self._hit, self._name_of = width, hit, _function("ggml_get_name", ctypes.c_char_p)
        self._error: BaseException | None = None
        self._expected = np.zeros(0, dtype=np.int32)
        self._armed: dict[int, tuple[Any, ...]] = {}
        self._handled: dict[int, int] = {}
        self.callback = module.ggml_backend_sched_eval_callback(self._called)
        self.user_data = None

    def _called(self, address: int, ask: bool, _: Any) -> bool:
        place = self._places.get(self._name_of(address))
        if ask and place == 0 and len(self._expected) == 1:
            self._handled[0] = 1
            return False
        if ask:
            return place is not None
        if place is not None and self._error is None:
            try:
                self._tell(place, address)
            except BaseException as wrong:  # noqa: BLE001 - what leaves here would end the graph silently
                self._error = wrong
        return True

    def _tell(self, place: int, address: int) -> None:
        if place:
            rows_nD = rows_of(address, self._width) if _plain(tensor_at(address), self._width) else None
            if place not in self._armed or rows_nD is None or self.handled(place):
                self._hit(place, address, rows_nD)
                return
            gate, memory_BTE, past_BPX, inputs_BTX = self._armed[place]
            if len(rows_nD) != memory_BTE.shape[0] * memory_BTE.shape[1]:
                self._hit(place, address, rows_nD)
                return
            stream_BTMD = rows_nD.reshape(*memory_BTE.shape[:2], 1, self._width)
            _, made = gate.step(stream_BTMD, memory_BTE, past_BPX, out_BTMD=stream_BTMD)
            if inputs_BTX is not None:
                inputs_BTX[...] = made
            self._handled[place] = len(rows_nD)
            return
        ids, done = integers_of(tensor_at(address).src[1]), self.handled(0)
        if np.array_equal(ids, self._expected[done : done + len(ids)]):
            self._handled[0] = done + len(ids)
        else:
            self._hit(place, address, None)

    def expect(self, ids: NDArray[np.int32]) -> None:
        """As Filter says."""
        self._expected, self._armed, self._handled = ids, {}, {}

    def arm(
        self, place: int, gate: MemoryGate, memory_BTE: Singles, past_BPX: Singles | None, inputs_BTX: Singles | None
    ) -> None:
        """As Filter says."""
        self._armed[place] = gate, memory_BTE, past_BPX, inputs_BTX

    def handled(self, place: int) -> int:
        """As Filter says."""
        return self._handled.get(place, 0)

    def handled_all(self, rows: int) -> bool:
        """As Filter says."""
        return all(self.handled(place) == rows for place in self._places.values())

    def take_error(self) -> BaseException | None:
        """As Filter says."""
        found, self._error = self._error, None
        return found


def _plain(tensor: Tensor, width: int) -> bool:
    rows = tensor.ne[2] == tensor.ne[3] == 1 and tensor.ne[0] == width
    return bool(tensor.type == F32 and rows and tensor.nb[0] == 4 and tensor.nb[1] == 4 * width)


def make_filter(names: Sequence[str], width: int, hit: Hit) -> Filter:
    """The C++ filter where the extension is built, else the Python one."""
    from engram.kernels import dispatch

    return (PythonFilter if dispatch.name() == "reference" else CFilter)(names, width, hit)
