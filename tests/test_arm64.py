"""The Arm decoders, cross-compiled and run under emulation: the reference's bits. Skipped without the tools."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_gather import CASES, _random

from engram.kernels.codecs import CODECS, find_codec

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
CSRC = Path(__file__).parents[1] / "kernels" / "csrc"
pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user (Debian's names)"
)


def test_arm_decoders_equal_the_reference(tmp_path: Path) -> None:
    """Every codec and width, random bytes, fp32 and bf16."""
    assert COMPILER and EMULATOR
    program = tmp_path / "rows"
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-static", f"-I{CSRC}", "-DENGRAM_ARM=1"]
    objects = []
    for isa in ("baseline", "neon"):
        for source in sorted((CSRC / "isa").glob("*.cpp")):
            objects.append(str(tmp_path / f"{isa}-{source.stem}.o"))
            made = ["-c", str(source), "-o", objects[-1]]
            subprocess.run([COMPILER, *flags, f"-DENGRAM_ISA={isa}", *made], check=True)
    ours = ("rows.cpp", "isa.cpp", "isa_tables.cpp", "crc.cpp")
    sources = [str(Path(__file__).parent / "arm64_rows.cpp"), *(str(CSRC / name) for name in ours)]
    subprocess.run([COMPILER, *flags, *sources, *objects, "-o", str(program)], check=True)

    question, expected = b"", b""
    for name, width in CASES:
        table = _random(name, width)
        codec = find_codec(f"{name}:3ebd70a4") if ":" in CODECS[name].name else CODECS[name]  # 0.37f
        for bf16 in (0, 1):
            question += struct.pack("<4i", codec.code, width, len(table), bf16) + table.tobytes()
            out = np.empty((len(table), width), dtype=np.uint16 if bf16 else np.float32)
            expected += codec.decode(table, width, out=out).tobytes()
    done = subprocess.run([EMULATOR, str(program)], input=question, capture_output=True, check=True)
    assert len(done.stdout) == len(expected)
    assert done.stdout == expected
