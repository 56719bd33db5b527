"""Which path serves the array operations: the C++ extension or the readable reference; chosen once, and named.

`ENGRAM_KERNELS` = auto (the default: C++ where it was built), cpp, cpp-INSTRUCTIONSET or reference. The GPU path
(gpu.py) is chosen by whoever holds tensors on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from engram.kernels.reference import KernelError

_chosen: tuple[str, ModuleType] | None = None


def available() -> list[str]:
    """Every path that can be forced here, the fastest first."""
    try:
        from engram.kernels import _C
    except ImportError:
        return ["reference"]
    return [*(f"cpp-{isa}" for isa in _C.available_isas()), "reference"]


def name() -> str:
    """The path in use, as printed: cpp-avx512, cpp-avx2, cpp-baseline, cpp-neon or reference."""
    return _choice()[0]


def ops() -> ModuleType:
    """The module with the operations: kernels/cpu.py or kernels/reference.py, same names and signatures.

    Raises KernelError where ENGRAM_KERNELS asks for a path that this install does not have.
    """
    return _choice()[1]


@contextmanager
def force(path: str) -> Iterator[None]:
    """Use another path for a while (tests and benchmarks): reference, cpp or cpp-INSTRUCTIONSET."""
    global _chosen
    before = _choice()
    _chosen = _find(path)
    try:
        yield
    finally:
        _chosen = _find(before[0])


def _choice() -> tuple[str, ModuleType]:
    global _chosen
    if _chosen is None:
        _chosen = _find(os.environ.get("ENGRAM_KERNELS", "auto"))
    return _chosen


def _find(path: str) -> tuple[str, ModuleType]:
    found = available()
    if path == "auto":
        path = found[0]
    elif path == "cpp" and len(found) > 1:
        path = found[0]
    if path not in found:
        known = ("auto", "cpp", "cpp-baseline", "cpp-avx2", "cpp-avx512", "cpp-neon", "reference")
        raise KernelError(
            f"kernels {path!r} " + ("cannot be used on this machine" if path in known else "are not known"),
            hint="this install has: " + ", ".join(found)
            + ("" if len(found) > 1 else "; install again with a C++17 compiler for the others"),
        )  # fmt: skip
    if path == "reference":
        from engram.kernels import reference

        return path, reference
    from engram.kernels import _C, cpu

    _C.use_isa(path.removeprefix("cpp-"))
    return path, cpu
