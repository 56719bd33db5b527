"""Rows on a real GPU: parity, gather against the measured copy limit, and decoding with the table in host memory.

    python benchmarks/gpu_rows.py [--gib 8] [--rounds 15] [--out FILE.json]

1. Gate: every codec, random bytes, from device and from pinned host memory, bit-equal to kernels/codecs.py; else it
   ends. 2. Limits of this machine: a copy within device memory, and one from pinned host memory. 3. Gathers of fresh
   random rows (D = 256) from tables of --gib GiB: GB/s of bytes read and written, as a share of the copy within the
   device, and for host tables of bytes read, as a share of the copy from the host. 4. A decode step as a CUDA graph:
   layers of bf16 matrices before the memory is used, then rows and gate; the rows from the device, from the host on the
   same stream, and from the host on a second stream beside the layers. All variants of a group alternate in one run;
   medians of CUDA event times. Needs --gib GiB of device memory and the same of host memory. Written without a GPU at
   hand: read the first figures with care.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram import EngramError
from engram.kernels.codecs import CODECS
from engram.kernels.reference import KernelError

try:
    from engram.kernels import gpu
except EngramError as missing:
    sys.exit(f"error: {missing}; hint: {missing.hint}")

WIDTH = 256
CALLS = (24, 512, 16_384, 131_072)  # rows a call; 24 is one token of one V4.1 layer
HIDDEN, LAYERS = 4096, 4  # the layers that run before the memory is used
COLUMNS = 24
BITS = {torch.float32: (torch.int32, np.uint32), torch.bfloat16: (torch.int16, np.uint16)}


def parity() -> int:
    """Compared values; EngramError where a bit differs."""
    random, compared = np.random.default_rng(0), 0
    for codec in CODECS.values():
        for width in (160, WIDTH):
            table = random.integers(0, 256, (4096, codec.row_bytes(width)), dtype=np.uint8)
            rows = random.integers(0, 4096, (1000, 3))
            plain = torch.from_numpy(table)
            for where, at in (("device", plain.cuda()), ("host", plain.pin_memory())):
                for dtype, (as_int, as_uint) in BITS.items():
                    got = gpu.gather(codec, at, torch.from_numpy(rows).cuda(), width=width, dtype=dtype)
                    want = np.empty((rows.size, width), dtype=np.float32 if dtype == torch.float32 else np.uint16)
                    codec.decode(table[rows.ravel()], width, want)
                    bits = got.view(as_int).cpu().numpy().view(as_uint)
                    if not np.array_equal(bits.ravel(), want.view(as_uint).ravel()):
                        raise EngramError(f"{codec.name}, width {width}, {dtype}, table on the {where}: bits differ")
                    compared += want.size
    gpu.check("cuda")
    return compared


def medians(variants: dict[str, Callable[[], Any]], before: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds of each variant; they alternate, and `before` runs untimed ahead of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, run in variants.items():
            before()
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first turns compile and warm up
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_limits(rounds: int) -> dict[str, float]:
    """GB/s: read plus write within the device, read from pinned host memory."""
    size = 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8).pin_memory()
    took = medians(
        {"device": lambda: target.copy_(source), "host": lambda: target.copy_(host, non_blocking=True)}, int, rounds
    )
    return {"device_gbs": 2 * size / took["device"] / 1e6, "host_gbs": size / took["host"] / 1e6}


def gathers(gib: float, rounds: int, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One line a codec, type of output and number of rows a call."""
    lines = []
    bytes_ = int(gib * (1 << 30))
    device = torch.randint(0, 256, (bytes_,), dtype=torch.uint8, device="cuda")
    host = torch.empty(bytes_, dtype=torch.uint8).pin_memory()
    host.copy_(device)
    for name in ("int8-row", "int8", "nf4", "fp8-e8m0", "bf16", "q4_0"):
        codec, row_bytes = CODECS[name], CODECS[name].row_bytes(WIDTH)
        count = bytes_ // row_bytes
        tables = {
            where: gpu.RowTable(at.data_ptr(), count, WIDTH, row_bytes, owner=at)
            for where, at in (("device", device), ("host", host))
        }
        for many in CALLS:
            rows = torch.zeros(many, 1, dtype=torch.int64, device="cuda")
            for dtype in BITS:
                out = torch.empty(many, WIDTH, dtype=dtype, device="cuda")
                variants: dict[str, Callable[[], Any]] = {
                    where: (lambda table=table: gpu.gather(codec, table, rows, out)) for where, table in tables.items()
                }
                took = medians(variants, lambda rows=rows: rows.random_(0, count), rounds)
                moved = many * (row_bytes + WIDTH * dtype.itemsize)
                lines.append(
                    {
                        "codec": name, "rows": many, "out": str(dtype).removeprefix("torch."),
                        **{f"{where}_us": took[where] * 1e3 for where in took},
                        "device_share_of_copy": moved / took["device"] / 1e6 / limits["device_gbs"],
                        "host_share_of_copy": many * row_bytes / took["host"] / 1e6 / limits["host_gbs"],
                    }
                )  # fmt: skip
    gpu.check("cuda")
    return lines


def decode(gib: float, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of one step for each placement of the table, as CUDA graphs; ids are new at every step."""
    codec, lines = CODECS["fp8-e8m0"], []
    row_bytes = codec.row_bytes(WIDTH)
    count = int(gib * (1 << 30)) // row_bytes
    on_device = torch.randint(0, 120, (count, row_bytes), dtype=torch.uint8, device="cuda")
    on_host = torch.empty(count, row_bytes, dtype=torch.uint8).pin_memory()
    on_host.copy_(on_device)
    device, host = (gpu.RowTable.of(codec, table, WIDTH) for table in (on_device, on_host))
    weights = [torch.randn(HIDDEN, 3 * HIDDEN, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(LAYERS)]
    back = torch.randn(3 * HIDDEN, HIDDEN, device="cuda", dtype=torch.bfloat16) / 110
    wide = torch.randn(COLUMNS * WIDTH, 2 * HIDDEN, device="cuda", dtype=torch.bfloat16) / 80
    norm, second = torch.ones(1, HIDDEN, device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()
    for batch in (1, 8, 64):
        rows = torch.zeros(batch, 1, COLUMNS, dtype=torch.int64, device="cuda")
        memory = torch.empty(batch, 1, COLUMNS * WIDTH, device="cuda", dtype=torch.bfloat16)
        hidden = torch.randn(batch, 1, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)

        def step(table: gpu.RowTable | None, beside: bool) -> torch.Tensor:
            if beside and table is not None:
                second.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(second):
                    gpu.gather(codec, table, rows, memory)
            x = hidden
            for weight in weights:
                x = x + (x @ weight).relu() @ back
            if table is None:
                return x
            if beside:
                torch.cuda.current_stream().wait_stream(second)
            else:
                gpu.gather(codec, table, rows, memory)
            key, value = (memory @ wide).split(HIDDEN, dim=-1)
            return gpu.gate_step(
                x, key.contiguous().unsqueeze(2), value.contiguous(), norm, norm, kind="copysign", eps=1e-20
            )[0]

        graphs: dict[str, Callable[[], Any]] = {}
        for name, table, beside in (
            ("none", None, False), ("device", device, False), ("host", host, False), ("host_beside", host, True),
        ):  # fmt: skip
            step(table, beside)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(table, beside)
            graphs[name] = graph.replay
        took = medians(graphs, lambda rows=rows: rows.random_(0, count), rounds * 3)
        speed = {f"{name}_against_device": took["device"] / took[name] for name in ("host", "host_beside")}
        lines.append({"batch": batch, **{f"{name}_us": ms * 1e3 for name, ms in took.items()}, **speed})
    gpu.check("cuda")
    return lines


def measure(gib: float, rounds: int) -> dict[str, Any]:
    """Everything; KernelError where there is no GPU or too little memory on it."""
    if not torch.cuda.is_available() or gpu.INTERPRETED:
        raise KernelError(
            "this benchmark needs a GPU that torch can use, and Triton's interpreter off",
            hint="install torch for CUDA or ROCm; unset TRITON_INTERPRET",
        )
    free, _ = torch.cuda.mem_get_info()
    if free < (gib + 4) * (1 << 30):
        raise KernelError(f"--gib {gib} needs {gib + 4:.0f} GiB of device memory, {free / (1 << 30):.0f} are free")
    torch.manual_seed(0)
    values = parity()
    limits = copy_limits(rounds)
    lines = gathers(gib, rounds, limits)
    torch.cuda.empty_cache()
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
        "table_gib": gib, "rounds": rounds, "values_bit_equal": values, "limits": limits, "gather": lines,
        "decode": decode(gib, rounds),
    }  # fmt: skip


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gib", type=float, default=8, help="size of the table")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each variant")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    chosen = parser.parse_args()
    try:
        result = measure(chosen.gib, chosen.rounds)
    except EngramError as error:
        print(f"error: {error}; hint: {error.hint}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
