"""The Triton kernels against the numpy reference: on a GPU where there is one, else in Triton's interpreter.

Without triton (extra `gpu`) everything here is skipped. What the interpreter cannot see, code generation, is tested by
compiling every kernel ahead of time for four targets, which needs no GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import layout_of
from numpy.typing import NDArray

from engram import EngramError
from engram.builders.layout import Layout
from engram.kernels import reference
from engram.kernels.codecs import CODECS, find_codec

pytest.importorskip("triton", reason="the extra gpu (triton) is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
BITS = {torch.float32: (torch.int32, np.uint32), torch.bfloat16: (torch.int16, np.uint16)}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """kernels/gpu.py; without a GPU imported, and used, with the interpreter on. Other tests see no change."""
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    from engram.kernels import gpu

    yield gpu


def on(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def bits_of(values: torch.Tensor) -> NDArray[Any]:
    as_int, as_uint = BITS[values.dtype]
    bits: NDArray[Any] = values.view(as_int).cpu().numpy().view(as_uint)
    return bits


def decoded(name: str, table_NK: NDArray[np.uint8], rows: NDArray[np.int64], width: int, dtype: torch.dtype) -> Any:
    out = np.empty((rows.size, width), dtype=np.float32 if dtype is torch.float32 else np.uint16)
    CODECS[name].decode(table_NK[rows.reshape(-1)], width, out)
    return out.view(BITS[dtype][1]).reshape(*rows.shape[:-1], -1)


def cases() -> Iterator[tuple[str, int]]:
    for name, width in itertools.product(CODECS, (36, 64, 72, 160, 256)):
        try:
            CODECS[name].row_bytes(width)
        except EngramError:
            continue
        yield name, width


@pytest.mark.parametrize(("name", "width"), list(cases()))
def test_gather_of_random_bytes_is_bit_equal(gpu: Any, name: str, width: int) -> None:
    random = np.random.default_rng(width)
    table = random.integers(0, 256, (50, CODECS[name].row_bytes(width)), dtype=np.uint8)
    for shape, dtype in (((5, 13, 4), torch.float32), ((2, 3, 3), torch.bfloat16)):  # one row a program, then tiles
        for few in (0, gpu.FEW_ROWS) if dtype is torch.bfloat16 else (0,):
            rows = random.integers(0, 50, shape)
            out = poisoned((*shape[:-1], shape[-1] * width), dtype)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gpu, "FEW_ROWS", few)
                assert gpu.gather(CODECS[name], on(table), on(rows), out) is out
            np.testing.assert_array_equal(bits_of(out), decoded(name, table, rows, width, dtype))


@pytest.mark.parametrize("name", ["fp8-tensor:3950b4f1", "nvfp4:3950b4f1", "nvfp4:7f000000"])
def test_the_tables_factor_reaches_the_kernel(gpu: Any, name: str) -> None:
    codec = find_codec(name)
    table = np.random.default_rng(3).integers(0, 256, (50, codec.row_bytes(160)), dtype=np.uint8)
    out = poisoned((50, 160), torch.float32)
    gpu.gather(codec, on(table), on(np.arange(50)[:, None]), out)
    np.testing.assert_array_equal(bits_of(out), codec.decode(table, 160).view(np.uint32))


@pytest.mark.parametrize("name", ["int8", "q8_0", "fp8-e8m0", "int8-row", "f32", "bf16"])
def test_every_scale_and_code(gpu: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fp16 scales, all pairs of e4m3 and e8m0, and the fp32 and bf16 numbers at the edges of rounding and NaN."""
    codes = np.arange(256, dtype=np.uint8)
    edges = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FFFFFFF, 0x3F808000,
                      0x3F818000, 0x3F808001, 0x7F7F7FFF, 0x7F7F8000], dtype=np.uint32)  # fmt: skip
    edges = np.concatenate([edges, edges | 0x80000000])
    halves = np.arange(65536, dtype=np.uint16).reshape(-1, 8)
    if name == "int8":
        table = np.concatenate([np.tile(codes, (len(halves), 1)), halves.view(np.uint8)], axis=1)
    elif name == "q8_0":
        blocks = np.tile(codes.reshape(8, 32), (len(halves), 1, 1))
        table = np.concatenate([halves[:, :, None].view(np.uint8), blocks], axis=2).reshape(len(halves), -1)
    elif name == "fp8-e8m0":
        table = np.concatenate([np.tile(codes, (256, 1)), np.repeat(codes[:, None], 8, axis=1)], axis=1)
    elif name == "int8-row":
        table = np.concatenate([np.tile(codes, (len(edges), 1)), edges[:, None].view(np.uint8)], axis=1)
    else:
        edges = np.resize(edges, 256)
        table = (edges if name == "f32" else (edges >> 16).astype(np.uint16)).view(np.uint8)[None]
    monkeypatch.setattr(gpu, "TILE", 1 << 16)
    monkeypatch.setattr(gpu, "FEW_ROWS", 0)
    rows = np.arange(len(table), dtype=np.int64)[:, None]
    for dtype in BITS:
        got = gpu.gather(CODECS[name], on(table), on(rows), width=256, dtype=dtype)
        np.testing.assert_array_equal(bits_of(got), decoded(name, table, rows, 256, dtype))
    if name == "f32":
        numbers = torch.from_numpy(table.view(np.float32))
        finite = ~numbers.isnan()
        assert torch.equal(got.cpu()[finite], numbers.to(torch.bfloat16)[finite])


def test_gather_reads_pages_strides_and_odd_addresses(gpu: Any) -> None:
    random = np.random.default_rng(1)
    rows = random.integers(0, 61, (7, 3))
    for name, width in (("int8", 72), ("f32", 64), ("bf16", 36), ("nf4", 160)):
        row_bytes = CODECS[name].row_bytes(width)
        table = random.integers(0, 256, (61, row_bytes), dtype=np.uint8)
        want = decoded(name, table, rows, width, torch.float32)
        packed = 4096 // row_bytes
        pages = random.integers(0, 256, (-(-61 // packed), 4096), dtype=np.uint8)
        for row in range(61):
            pages[row // packed, row % packed * row_bytes :][:row_bytes] = table[row]
        on_pages, wide = on(pages), on(np.pad(table, ((0, 0), (5, 8))))
        views = [
            gpu.RowTable.of_pages(CODECS[name], on_pages, width, 61, packed),
            gpu.RowTable(on_pages.data_ptr(), 61, width, 4096, packed),
            wide[:, 5 : 5 + row_bytes],
        ]
        for view in [*views, on(table).cpu().pin_memory()] if NATIVE else views:
            np.testing.assert_array_equal(bits_of(gpu.gather(CODECS[name], view, on(rows), width=width)), want)
    with pytest.raises(gpu.KernelError, match="cannot hold 62 rows"):
        gpu.RowTable.of_pages(CODECS["nf4"], on_pages[:1], 160, 62, packed)


def test_rows_past_4_gib_are_addressed(gpu: Any, tmp_path: Path) -> None:
    codec, width, rows = CODECS["int8-row"], 256, 20_000_000
    if NATIVE:
        table = torch.zeros(rows, 260, dtype=torch.uint8, device=DEVICE)
    else:  # 5.2 GB of addresses, a few kilobytes of disk
        table = torch.from_numpy(np.memmap(tmp_path / "sparse", mode="w+", dtype=np.uint8, shape=(rows, 260)))
    last = np.random.default_rng(2).integers(0, 256, 260, dtype=np.uint8)
    table[-1] = on(last)
    got = gpu.gather(codec, table, on(np.array([[rows - 1, 0]])), width=width)
    want = decoded("int8-row", last[None], np.zeros((1, 1), dtype=np.int64), width, torch.float32)
    np.testing.assert_array_equal(bits_of(got)[0, :width], want[0])
    assert not got[0, width:].any()


@pytest.mark.parametrize("wrong", [-1, 50, 1 << 40])
def test_a_row_outside_the_table_is_a_typed_error(gpu: Any, wrong: int) -> None:
    table = np.full((50, 36), 60, dtype=np.uint8)
    rows = on(np.array([[3, wrong]]))
    out = poisoned((1, 64), torch.float32)
    if not NATIVE:
        with pytest.raises(gpu.KernelError, match=f"row {wrong} is outside the table, which has 50 rows"):
            gpu.gather(CODECS["int8-row"], on(table), rows, out)
        assert out.isnan().all()
    view = gpu.RowTable.of(CODECS["int8-row"], on(table), 32)
    # what a GPU does, which cannot refuse at the call: zeros, and the error when it is asked
    gpu._launch_gather(CODECS["int8-row"], view, rows, out)
    assert out[0, :32].all() and not out[0, 32:].any() and not out.isnan().any()
    with pytest.raises(gpu.KernelError, match=f"row id {wrong} is outside its table"):
        gpu.check(DEVICE)
    gpu.check(DEVICE)  # said once


def test_gather_refuses_what_it_cannot_read(gpu: Any) -> None:
    codec, table, rows = CODECS["nf4"], on(np.zeros((4, 36), dtype=np.uint8)), on(np.zeros((2, 3), dtype=np.int64))
    refused: list[tuple[str, Any]] = [
        ("rows must be int64", lambda: gpu.gather(codec, table, rows.int(), width=64)),
        ("rows must be contiguous", lambda: gpu.gather(codec, table, rows.t(), width=64)),
        ("at least one axis", lambda: gpu.gather(codec, table, rows[0, 0], width=64)),
        ("needs `out` or `width`", lambda: gpu.gather(codec, table, rows)),
        ("table must be uint8", lambda: gpu.gather(codec, table.to(torch.int8), rows, width=64)),
        ("with strides", lambda: gpu.gather(codec, table.t(), rows, width=8)),
        (r"uint8 \[N, 36\], found \[4, 35\]", lambda: gpu.gather(codec, table[:, :35], rows, width=64)),
        (r"out must be float32 or bfloat16 \[2, 192\]", lambda: gpu.gather(codec, table, rows, on(np.zeros(384)))),
        ("found float64", lambda: gpu.gather(codec, table, rows, width=64, dtype=torch.float64)),
    ]
    for words, call in refused:
        with pytest.raises(gpu.KernelError, match=words):
            call()


def random_flags(random: np.random.Generator, batch: int, length: int, kept: int) -> list[NDArray[np.bool_]]:
    shapes = ((batch, length), (batch, kept + length), (batch, kept + length))
    return [random.random(shape) < 0.15 for shape in shapes]


@pytest.mark.parametrize(("batch", "length", "kept"), [(2, 1, 3), (3, 40, 3), (1, 2, 5)])
def test_hash_equals_the_reference(gpu: Any, batch: int, length: int, kept: int) -> None:
    """Multipliers over the whole of int64, so that products wrap and mixes are negative; two layers in one launch."""
    random = np.random.default_rng(length)
    orders, depth, fill = (2, 4), 4, 7
    ids = random.integers(-3, 200, (batch, length))
    token_map = random.integers(0, 1 << 40, 200)
    history = random.integers(-3, 1 << 40, (batch, kept))
    dead, start, stop = random_flags(random, batch, length, kept)
    multipliers = random.integers(-(1 << 63), 1 << 63, (2, depth))
    primes = random.integers(2, 1 << 33, (2, 2, 3))
    for mapped, oldest_first in ((True, False), (False, False), (True, True)):
        constants = gpu.HashConstants.of(
            multipliers.tolist(), orders, primes.tolist(), fill=fill, vocab_size=200, sums=False,
            oldest_first=oldest_first, token_map_V=token_map if mapped else None, device=DEVICE,
        )  # fmt: skip
        got = gpu.hash_layers(on(ids), on(dead), on(start), on(stop), on(history), constants).cpu().numpy()
        tokens = np.where(ids >= 0, token_map[np.maximum(ids, 0)], ids) if mapped else ids
        back = reference.look_back(tokens, dead, start, stop, history, fill=fill, depth=depth)
        back = back[..., ::-1] if oldest_first else back
        for layer in range(2):
            local = reference.hash_ngrams(back, multipliers[layer].tolist(), orders, primes[layer].tolist())
            first = np.cumsum([0, *primes[layer].reshape(-1)[:-1]])
            np.testing.assert_array_equal(got[layer], local + first)
        assert length < 40 or (got >= 0).all()


@pytest.mark.parametrize("length", [1, 40])
def test_sums_equal_the_reference(gpu: Any, length: int) -> None:
    """Multipliers over the whole of int64, others for each column, so that sums wrap and are negative; two layers."""
    random = np.random.default_rng(length)
    orders, depth, columns = (1, 2, 4), 4, 9
    ids, history = random.integers(0, 200, (3, length)), random.integers(0, 200, (3, 5))
    dead, start, stop = random_flags(random, 3, length, 5)
    multipliers = random.integers(-(1 << 63), 1 << 63, (2, columns, depth))
    multipliers[:, np.arange(depth) >= np.repeat(orders, 3)[:, None]] = 0
    primes = random.integers(2, 1 << 33, (2, 3, 3))
    constants = gpu.HashConstants.of(
        multipliers.reshape(2, -1).tolist(), orders, primes.tolist(), fill=0, vocab_size=200, sums=True,
        oldest_first=False, device=DEVICE,
    )  # fmt: skip
    got = gpu.hash_layers(on(ids), on(dead), on(start), on(stop), on(history), constants).cpu().numpy()
    back = reference.look_back(ids, dead, start, stop, history, fill=0, depth=depth)
    for layer in range(2):
        moduli = primes[layer].reshape(-1)
        local = reference.sum_ngrams(back, multipliers[layer], moduli)
        np.testing.assert_array_equal(got[layer], local + np.cumsum([0, *moduli[:-1]]))


@pytest.mark.parametrize("dialect", ["demo", "v41", "engram-peft", "qwen-ple", "longcat", "identity"])
def test_hash_equals_the_layout_in_chunks(gpu: Any, dialect: str) -> None:
    layout = layout_of(dialect)
    constants = gpu.HashConstants.of(
        [layout.multipliers[n] for n in layout.layers], layout.orders, [layout.primes[n] for n in layout.layers],
        fill=layout._hasher().fill, vocab_size=40, negative_ids=not layout.rules.raw, sums=layout.rules.sums,
        oldest_first=layout.rules.oldest_first, token_map_V=layout.token_map, device=DEVICE,
    )  # fmt: skip
    ids = np.random.default_rng(3).integers(0 if layout.rules.raw else -1, 40, (2, 23))
    before = layout._beginning(2)
    want = layout.rows(ids)
    for begin, end in ((0, 1), (1, 3), (3, 20), (20, 23)):
        part = ids[:, begin:end]
        dead, stop = layout.flags(part)
        start = np.concatenate([before.start_BJ, np.zeros(part.shape, dtype=bool)], axis=1)
        stop = np.concatenate([before.stop_BJ, stop], axis=1)
        got = gpu.hash_layers(on(part), on(dead), on(start), on(stop), on(before.ids_BJ), constants).cpu().numpy()
        for place, layer in enumerate(layout.layers):
            np.testing.assert_array_equal(got[place], want[layer][:, begin:end])
        before = layout.history(part, before)


OF_NINE: dict[str, Any] = dict(fill=0, vocab_size=9, sums=False, oldest_first=False, device=DEVICE)


def test_hash_refuses_what_it_cannot_hash(gpu: Any) -> None:
    constants = gpu.HashConstants.of([[3, 5]], (2,), [[[101]]], token_map_V=np.arange(9), **OF_NINE)
    ids, flag, flags = on(np.array([[4, 9]])), on(np.zeros((1, 2), bool)), on(np.zeros((1, 3), bool))
    one, out = on(np.zeros((1, 1), dtype=np.int64)), on(np.zeros((1, 1, 2, 1), dtype=np.int64))
    if not NATIVE:
        with pytest.raises(gpu.KernelError, match="token id 9 is outside the layout's vocabulary of 9 ids"):
            gpu.hash_layers(ids, flag, flags, flags, one, constants)
    gpu._launch_hash(ids, flag, flags, flags, one, constants, out)
    with pytest.raises(gpu.KernelError, match="token id 9 is outside the vocabulary"):
        gpu.check(DEVICE)
    with pytest.raises(gpu.KernelError, match="J of at least 1"):
        gpu.hash_layers(ids, flag, flag, flag, one[:, :0], constants)
    with pytest.raises(gpu.KernelError, match=r"stop must be bool \[1, 3\]"):
        gpu.hash_layers(ids, flag, flags, flag, one, constants)
    with pytest.raises(gpu.KernelError, match="multipliers"):
        gpu.HashConstants.of([[3, 5, 7]], (2,), [[[101]]], **OF_NINE)
    with pytest.raises(gpu.KernelError, match="1 layers, 2 columns and 2 distances"):
        gpu.HashConstants.of([[3, 5]], (2,), [[[101, 103]]], **(OF_NINE | {"sums": True}))
    with pytest.raises(gpu.KernelError, match="the token map has 8 ids, the vocabulary 9"):
        gpu.HashConstants.of([[3, 5]], (2,), [[[1]]], token_map_V=np.arange(8), **OF_NINE)


@pytest.mark.parametrize("wrong", [9, -1])
def test_raw_ids_outside_the_vocabulary_are_faults(gpu: Any, wrong: int) -> None:
    """The identity's row is its id: one that has no row must not become another's."""
    constants = gpu.HashConstants.of([[1]], (1,), [[[9]]], negative_ids=False, **OF_NINE)
    ids, flag = on(np.array([[4, wrong]])), on(np.zeros((1, 2), bool))
    nothing, out = on(np.zeros((1, 0), dtype=np.int64)), on(np.zeros((1, 1, 2, 1), dtype=np.int64))
    if not NATIVE:
        with pytest.raises(gpu.KernelError, match=f"token id {wrong} is outside the layout's vocabulary of 9 ids"):
            gpu.hash_layers(ids, flag, flag, flag, nothing, constants)
    gpu._launch_hash(ids, flag, flag, flag, nothing, constants, out)
    with pytest.raises(gpu.KernelError, match=f"token id {wrong} is outside the vocabulary"):
        gpu.check(DEVICE)


# The kernel computes in fp32, the reference in float64: a few units of 2^-24 of the largest term. With bf16 each result
# is rounded once to 8 bits, an error of 2^-8 of it at most; the convolution takes its inputs as they were stored.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-8 + 1e-5, "atol": 1e-5}}


def gate_case(dtype: torch.dtype, *, branches: int, width: int, length: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(width + branches)
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (2, length, branches, width), "key": (2, length, branches, width), "value": (2, length, width),
        "query_norm": (branches, width), "key_norm": (branches, width), "conv_norm": (branches, width),
        "conv_weight": (branches * width, 4), "past": (2, 9, branches * width),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=make).to(DEVICE, dtype) for name, shape in shapes.items()}


def gate_by_reference(
    case: dict[str, torch.Tensor], kind: str, eps: float, mask: Any, past: Any, stored: torch.Tensor | None = None
) -> tuple[Any, Any]:
    """kernels/reference.py put together in float64: the stream and the convolution's inputs (used as `stored`)."""
    n = {name: tensor.double().cpu().numpy() for name, tensor in case.items()}
    opened = reference.gate(n["hidden"], n["key"], n["query_norm"], n["key_norm"], eps=eps, kind=kind)
    added = (opened * mask[..., None])[..., None] * n["value"][:, :, None]
    inputs = reference.rms_norm(added, n["conv_norm"], 1e-5).reshape(*mask.shape, -1)
    taken = inputs if stored is None else stored.double().cpu().numpy()
    convolved = reference.short_conv(taken, past, n["conv_weight"], 3).reshape(added.shape)
    return n["hidden"] + (added + convolved) * mask[..., None, None], inputs


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("kind", "branches", "width", "length"), [
    ("plain", 1, 64, 1), ("sqrt", 2, 40, 7), ("copysign", 4, 72, 3), ("sqrt", 1, 300, 11),
])  # fmt: skip
def test_gate_equals_the_reference(
    gpu: Any, dtype: torch.dtype, kind: str, branches: int, width: int, length: int
) -> None:
    case = gate_case(dtype, branches=branches, width=width, length=length)
    case["key"][0, 0] = 0  # a score of exactly zero
    mask = np.arange(2 * length).reshape(2, length) % 5 != 4
    conv = gpu.Convolution(case["conv_norm"], case["conv_weight"], 3, 1e-5)
    names = ("hidden", "key", "value", "query_norm", "key_norm")
    for past in (case["past"], case["past"][:, :2].contiguous(), None):
        before = np.zeros((2, 9, branches * width))
        if past is not None:
            before[:, 9 - past.shape[1] :] = past.double().cpu().numpy()
        out = poisoned(tuple(case["hidden"].shape), dtype)
        got, inputs = gpu.gate_step(
            *(case[name] for name in names), kind=kind, eps=1e-6, conv=conv, past_BPX=past, mask_BT=on(mask), out=out
        )
        want, want_inputs = gate_by_reference(case, kind, 1e-6, mask, before, inputs)
        assert got is out and inputs.dtype == dtype
        np.testing.assert_allclose(got.double().cpu().numpy(), want, **TOLERANCE[dtype])
        np.testing.assert_allclose(inputs.double().cpu().numpy(), want_inputs, **TOLERANCE[dtype])
        assert torch.equal(got[0, 4:5], case["hidden"][0, 4:5])  # masked
    got, inputs = gpu.gate_step(*(case[name] for name in names), kind=kind, eps=1e-20)
    case["conv_weight"].zero_()
    want, _ = gate_by_reference(case, kind, 1e-20, np.ones_like(mask), before)
    assert inputs is None
    np.testing.assert_allclose(got.double().cpu().numpy(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_any_chunking_of_the_gate_gives_the_same_bits(gpu: Any, dtype: torch.dtype) -> None:
    case = gate_case(dtype, branches=2, width=48, length=12)
    conv = gpu.Convolution(case["conv_norm"], case["conv_weight"], 3, 1e-5)

    def step(begin: int, end: int, past: torch.Tensor | None) -> Any:
        parts = (case[name][:, begin:end].contiguous() for name in ("hidden", "key", "value"))
        return gpu.gate_step(
            *parts, case["query_norm"], case["key_norm"], kind="sqrt", eps=1e-6, conv=conv, past_BPX=past
        )

    whole, _ = step(0, 12, None)
    seen, pieces = torch.zeros(2, 0, 96, dtype=dtype, device=DEVICE), []
    for begin, end in ((0, 1), (1, 2), (2, 7), (7, 10), (10, 12)):
        piece, inputs = step(begin, end, seen[:, -9:].contiguous())
        pieces.append(piece)
        seen = torch.cat([seen, inputs], dim=1)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_gate_gives_the_published_output(gpu: Any) -> None:
    golden = json.loads((GOLDEN / "module_demo_tiny.json").read_text())
    config, weights = golden["config"], {name: np.array(value) for name, value in golden["weights"].items()}
    layout = Layout.build(
        dialect="demo", orders=(2, 3), heads=2, head_dim=4, layers=(1,), rows_per_head=config["engram_vocab_size"],
        pad_id=config["compressed_pad_id"], vocab_size=30, token_map=np.arange(30),
    )  # fmt: skip
    memory = weights["table"][layout.rows(np.array(golden["compressed_ids"]))[1]]
    memory = memory.reshape(*memory.shape[:2], -1)
    hidden = np.array(golden["hidden"])
    key = np.einsum("bte,mde->btmd", memory, weights["key_w"].reshape(2, 8, -1)) + weights["key_b"].reshape(2, 8)
    value = memory @ weights["value_w"].T + weights["value_b"]
    stream, key, value, query_norm, key_norm, conv_norm, taps = (
        on(array).float() for array in
        (hidden, key, value, weights["norm_query"], weights["norm_key"], weights["norm_conv"], weights["conv_w"])
    )  # fmt: skip
    conv = gpu.Convolution(conv_norm, taps.reshape(16, 4), config["dilation"], config["eps_conv_norm"])
    got, _ = gpu.gate_step(
        stream, key, value, query_norm, key_norm, kind="sqrt", eps=config["eps_gate_norms"], conv=conv
    )
    np.testing.assert_allclose(got.cpu().numpy(), hidden + golden["delta"], rtol=1e-5, atol=1e-5)


def test_gate_refuses_what_it_cannot_open(gpu: Any) -> None:
    case = gate_case(torch.float32, branches=1, width=8, length=2)
    names = ("hidden", "key", "value", "query_norm", "key_norm")
    for name, change, words in (
        ("hidden", lambda x: x[:, :, 0], r"hidden must be \[B, T, M, D\]"), ("value", lambda x: x[:1], "value must be"),
        ("key", lambda x: x.double(), "key must be float32 or bfloat16"),
        ("hidden", lambda x: x.transpose(0, 1), "hidden must be contiguous"),
    ):  # fmt: skip
        changed = {**case, name: change(case[name])}
        with pytest.raises(gpu.KernelError, match=words):
            gpu.gate_step(*(changed[name] for name in names), kind="sqrt", eps=1e-6)
    with pytest.raises(gpu.KernelError, match="'other'"):
        gpu.gate_step(*(case[name] for name in names), kind="other", eps=1e-6)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_tensors_of_the_cpu_need_the_interpreter() -> None:
    done = run_python(
        "import torch\n"
        "from engram.kernels import gpu\n"
        "from engram.kernels.codecs import CODECS\n"
        "table, rows = torch.zeros(3, 36, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)\n"
        "try: gpu.gather(CODECS['int8-row'], gpu.RowTable(table.data_ptr(), 3, 32, 36), rows)\n"
        "except gpu.KernelError as error: print(error, '|', error.hint)\n"
    )
    assert done.stdout.startswith("these kernels run on tensors of a GPU, found one on cpu | use kernels/cpu.py")


def test_without_triton_the_error_says_what_to_install() -> None:
    done = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "from engram import EngramError\n"
        "try: import engram.kernels.gpu\n"
        "except EngramError as error: print(type(error).__name__, error, '|', error.hint)\n"
    )
    assert done.stdout.startswith("KernelError the GPU kernels need triton") and "engram-lm[gpu]" in done.stdout


@pytest.mark.skipif(NATIVE, reason="this machine has a GPU")
def test_the_benchmark_refuses_without_a_gpu() -> None:
    done = run_python("import runpy; runpy.run_path('benchmarks/gpu_rows.py', run_name='__main__')")
    assert done.returncode == 1
    assert done.stderr.startswith("error: this benchmark needs a GPU") and "hint: install torch for CUDA" in done.stderr


@pytest.mark.parametrize("target", ["cuda:80:32", "cuda:90:32", "cuda:120:32", "hip:gfx942:64"])
def test_every_kernel_compiles_ahead_of_time(target: str, tmp_path: Path) -> None:
    code = (Path(__file__).parent / "compile_gpu.py").read_text()
    done = run_python(code, TRITON_CACHE_DIR=str(tmp_path), TARGET=target)
    if done.stdout.startswith("missing"):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "compiled"
