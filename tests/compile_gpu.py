"""Compiles every Triton kernel for $TARGET (backend:architecture:warp size) without a GPU; started by test_gpu.py.

It runs in a process of its own, where the interpreter is off. Says "missing …" where this triton lacks the compiler.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engram.kernels import triton_kernels as kernels

backend, architecture, warp = os.environ["TARGET"].split(":")
target = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, int(warp))
folder = Path(triton.__file__).parent / "backends" / {"cuda": "nvidia", "hip": "amd"}[backend]
if not folder.is_dir() or backend == "cuda" and not (
    (folder / "bin" / "ptxas").exists() or shutil.which("ptxas")
):  # fmt: skip
    print(f"missing: this triton has no compiler for {backend}")
    sys.exit()


def assembly(kernel: Any, types: str, **constants: int) -> str:
    """The kernel's code; `types` are those of the arguments, in order, that are not constants."""
    warps = constants.pop("num_warps", 4)
    given = iter(types.split())
    signature = {name: "constexpr" if name in constants else next(given) for name in kernel.arg_names}
    assert next(given, None) is None
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": warps})
    assert made.asm["cubin" if backend == "cuda" else "hsaco"]
    code = made.asm["ptx" if backend == "cuda" else "amdgcn"]
    return code if isinstance(code, str) else code.decode()


for code, width in enumerate((64, 160, 256, 160, 72, 256, 160, 256, 160, 256, 256, 160, 64, 160, 256, 160)):
    wide = 1 << (width - 1).bit_length()
    for out, tile, more in (("*i32", 2048 // wide, {}), ("*i16", 1, {"rows_per_page": 1})):
        pages = "" if more else "i32"
        text = assembly(
            kernels.gather_rows, f"i64 *i64 {out} *fp32 *i64 i32 i64 {pages} i32 fp32", D=width, BD=wide, BR=tile,
            ROW_BYTES=4 * width, CODE=code, ALIGNED=code + tile > 1, **more,
        )  # fmt: skip
        # the bits depend on it: a product is rounded by itself, and subnormals are kept
        assert "fma.rn" not in text and ".ftz" not in text and "v_fma_f32" not in text
        assert backend == "cuda" or ".amdhsa_float_denorm_mode_32 3" in text

sizes = {"J": 3, "DEPTH": 4, "C": 24, "BC": 32, "BT": 16}
tensors = "*i64 *i64 *u8 *u8 *u8 *i64 *i64 *i64 *i64 *i64 *i64 *i64"
mapped, raw = {"MAPPED": 1, "NEGATIVE": 1, "OLDEST_FIRST": 0}, {"MAPPED": 0, "NEGATIVE": 0, "OLDEST_FIRST": 0}
assembly(kernels.hash_rows, f"{tensors} i32 i32 i64 i64", SUMS=0, **mapped, **sizes)
assembly(kernels.hash_rows, f"{tensors} i32 i32 i64 i64", SUMS=0, **(mapped | {"OLDEST_FIRST": 1}), **sizes)
assembly(kernels.hash_rows, f"{tensors} i64 i64", SUMS=0, tokens=1, length=1, **raw, **sizes)  # a token of decoding
assembly(kernels.hash_rows, f"{tensors} i32 i32 i64 i64", SUMS=1, **raw, **sizes)
alone = {"J": 0, "DEPTH": 1, "C": 1, "BC": 1, "BT": 16}
assembly(kernels.hash_rows, f"{tensors} i32 i32 i64 i64", SUMS=0, **raw, **alone)  # the identity

conv = {"W": 4, "DILATION": 3}
large = {"num_warps": 8}
for kind in ("*fp32", "*bf16"):
    tensors = f"{kind} " * 5 + f"*u8 *fp32 {kind} {kind} {kind} {kind} {kind}"
    small = {"M": 1, "D": 576, "BD": 1024, "KIND": 1, "MASKED": 0, "WHOLE": 1, "length": 1}
    assembly(kernels.gate_rows, f"{tensors} i32 fp32 fp32", **small, **conv)
    qwen = {"M": 4, "D": 2560, "BD": 4096, "MASKED": 1}
    assembly(kernels.gate_rows, f"{tensors} i32 i32 fp32 fp32", KIND=0, WHOLE=0, **qwen, **conv, **large)
    v41 = {"M": 4, "D": 5120, "BD": 8192, "KIND": 2, "MASKED": 1, "WHOLE": 0, "W": 0, "DILATION": 1}
    assembly(kernels.gate_rows, f"{tensors} i32 i32 fp32 fp32", **v41, **large)
    tensors = f"{kind} {kind} *u8 *fp32 {kind} {kind} {kind} {kind}"
    assembly(kernels.conv_rows, f"{tensors} i32 i32", **qwen, **conv, **large)
print("compiled")
