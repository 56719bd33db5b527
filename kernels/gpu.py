"""Hash, gather and gate on a GPU: the ops of kernels/reference.py over torch tensors, in Triton (extra `gpu`).

Everything is queued on the current stream and nothing here waits for the GPU, except `check`. Ids that are not in the
table or the vocabulary cannot be refused at the call without waiting: their rows become zeros and their positions hash
as if the id were not mapped, the fault is kept on the device, and `check` raises it. Call `check` where you wait for
the GPU anyway, once a step. Tensors of the CPU work in Triton's interpreter only (tests); there ids are refused
at once.

Shape letters: those of kernels/reference.py; K bytes a row, L layers, X = M * D channels, P past positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from engram.kernels.codecs import Codec
from engram.kernels.fp_codecs import E2M1
from engram.kernels.gguf_codecs import IQ4_NL_BOOK
from engram.kernels.group_codecs import NF4_BOOK
from engram.kernels.hadamard_codecs import H1, H2, H3, H4, Hadamard
from engram.kernels.reference import KernelError, id_outside, row_outside

try:
    from engram.kernels import triton_kernels as kernels
except ImportError as missing:
    raise KernelError(f"the GPU kernels need triton: {missing}", hint="pip install 'engram-lm[gpu]'") from None

INTERPRETED: bool = kernels.INTERPRETED  # tensors of the CPU, in Triton's interpreter; else tensors of a GPU
KINDS = {"plain": 0, "sqrt": 1, "copysign": 2}  # of the gate, as in GateConfig
FEW_ROWS = 256  # up to here one program takes one row, so that all are in flight at once
TILE = 2048  # values that one program holds
HASH_TILE = 16  # positions that one program hashes
_BOOKS = {4: NF4_BOOK, 8: IQ4_NL_BOOK, 14: E2M1} | {codec.code: codec.steps for codec in (H4, H3, H2, H1)}  # by code
_FAULT_WORDS = {1: "row id {} is outside its table", 2: "token id {} is outside the vocabulary"}
_faults: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class RowTable:
    """Where encoded rows lie: row i at address + (i // rows_per_page) * pitch + (i % rows_per_page) * K.

    `address` is one that the GPU can read: of device memory, or of pinned host memory (CUDA and HIP give both one
    address space). `owner` keeps that memory alive; with a bare address the caller does, and answers for its size.
    """

    address: int
    rows: int
    width: int
    pitch: int
    rows_per_page: int = 1
    owner: Tensor | None = None

    @classmethod
    def of(cls, codec: Codec, table_NK: Tensor, width: int) -> RowTable:
        """uint8 [N, K], the bytes of a row side by side, rows at any stride; of the GPU, or pinned on the host."""
        _readable("table", table_NK)
        if table_NK.shape[1] != codec.row_bytes(width):
            raise KernelError(
                f"a table of {codec.name} rows of {width} values is uint8 [N, {codec.row_bytes(width)}], "
                f"found {list(table_NK.shape)}"
            )
        return cls(table_NK.data_ptr(), len(table_NK), width, table_NK.stride(0), owner=table_NK)

    @classmethod
    def of_pages(cls, codec: Codec, pages_PX: Tensor, width: int, rows: int, rows_per_page: int) -> RowTable:
        """uint8 [pages, bytes a page], `rows_per_page` rows packed from the start of each, as in our table files."""
        _readable("pages", pages_PX)
        pages, size = pages_PX.shape
        if rows_per_page < 1 or rows_per_page * codec.row_bytes(width) > size or rows > pages * rows_per_page:
            raise KernelError(
                f"pages {list(pages_PX.shape)} cannot hold {rows} rows of {codec.row_bytes(width)} bytes, "
                f"{rows_per_page} a page"
            )
        return cls(pages_PX.data_ptr(), rows, width, pages_PX.stride(0), rows_per_page, pages_PX)


def gather(
    codec: Codec,
    table: Tensor | RowTable,
    rows: Tensor,
    out: Tensor | None = None,
    *,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of one table, decoded and concatenated in column order: `rows` [..., C] int64 to [..., C * D].

    The result is float32 or bfloat16 (`out`, or new of `dtype`), bit for bit what `codec.decode` gives. `table` is
    uint8 [N, K] with rows of `width` values (found from `out` where it is given), or a RowTable for pages and bare
    addresses. KernelError for other types, shapes, strides, devices; for an id outside the table see the head of this
    file.
    """
    device = _runs_on(rows)
    _fits("rows", rows, (torch.int64,), tuple(rows.shape), device)
    if not rows.dim():
        raise KernelError("rows must have at least one axis, the columns")
    if isinstance(table, Tensor):
        if width is None and out is not None and rows.numel():
            width = out.numel() // rows.numel()
        if width is None:
            raise KernelError("gather needs `out` or `width`")
        view = RowTable.of(codec, table, width)
    else:
        view = table
    if view.owner is not None and view.owner.is_cuda and view.owner.device != device:
        raise KernelError(f"the table is on {view.owner.device}, rows are on {device}")
    if device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < view.rows:
        outside = (rows < 0) | (rows >= view.rows)
        raise row_outside(rows.numpy(), int(outside.flatten().nonzero()[0]), view.rows)
    shape = (*rows.shape[:-1], rows.shape[-1] * view.width)
    out = torch.empty(shape, dtype=dtype, device=device) if out is None else out
    _fits("out", out, (torch.float32, torch.bfloat16), shape, device)
    _launch_gather(codec, view, rows, out)
    return out


def _launch_gather(codec: Codec, view: RowTable, rows: Tensor, out: Tensor) -> None:
    if not rows.numel():
        return
    row_bytes = codec.row_bytes(view.width)
    word = {"f32": 4, "bf16": 2}.get(codec.name, 1)
    factor = float(codec.norm(view.width)) if isinstance(codec, Hadamard) else codec.factor
    wide = _power_of_two(view.width)
    tile = 1 if rows.numel() <= FEW_ROWS else max(1, TILE // wide)
    with _current(rows.device):
        kernels.gather_rows[(-(-rows.numel() // tile),)](
            view.address, rows, out.view(torch.int16 if out.dtype == torch.bfloat16 else torch.int32),
            _book(codec.code, rows.device), _fault(rows.device), rows.numel(), view.rows, view.rows_per_page,
            view.pitch, factor, D=view.width, BD=wide, BR=tile, ROW_BYTES=row_bytes, CODE=codec.code,
            ALIGNED=all(number % word == 0 for number in (view.address, view.pitch, row_bytes)), enable_fp_fusion=False,
        )  # fmt: skip


@dataclass(frozen=True)
class HashConstants:
    """What hashing needs, on the device: int64 [L, X], [L, C], [L, C], each column's order [C], the token map [V].

    X is K, the highest order; where `sums` it is C * K, column after column. Ids from `vocab_size` on are refused, and
    ids below zero unless `negative_ids`. `oldest_first` as in reference.Hasher.
    """

    multipliers_LX: Tensor
    primes_LC: Tensor
    offsets_LC: Tensor
    order_C: Tensor
    depth: int
    fill: int
    vocab_size: int
    negative_ids: bool
    sums: bool
    oldest_first: bool
    token_map_V: Tensor | None = None

    @classmethod
    def of(
        cls,
        multipliers_LX: Sequence[Sequence[int]],
        orders_O: Sequence[int],
        primes_LOH: Sequence[Sequence[Sequence[int]]],
        *,
        fill: int,
        vocab_size: int,
        sums: bool,
        oldest_first: bool,
        negative_ids: bool = True,
        token_map_V: Any = None,
        device: torch.device | str = "cuda",
    ) -> HashConstants:
        """From a layout's numbers; each column's offset is the sum of the primes before it in its layer."""
        primes = torch.tensor([[p for heads in layer for p in heads] for layer in primes_LOH], dtype=torch.int64)
        order = [n for n, heads in zip(orders_O, primes_LOH[0], strict=True) for _ in heads]
        multipliers = torch.tensor([list(layer) for layer in multipliers_LX], dtype=torch.int64)
        depth, columns = max(orders_O), len(order)
        if multipliers.shape != (len(primes), depth * (columns if sums else 1)):
            raise KernelError(f"multipliers {list(multipliers.shape)} must be one for each of {len(primes)} layers"
                              f"{f', {columns} columns' if sums else ''} and {depth} distances")  # fmt: skip
        token_map = None if token_map_V is None else torch.as_tensor(token_map_V, dtype=torch.int64).to(device)
        if token_map is not None and len(token_map) < vocab_size:
            raise KernelError(f"the token map has {len(token_map)} ids, the vocabulary {vocab_size}")
        return cls(
            multipliers.to(device), primes.to(device), (primes.cumsum(1) - primes).to(device),
            torch.tensor(order, dtype=torch.int64, device=device), depth, fill, vocab_size, negative_ids, sums,
            oldest_first, token_map,
        )  # fmt: skip


def hash_layers(
    ids_BT: Tensor, dead_BT: Tensor, start_BJT: Tensor, stop_BJT: Tensor, history_BJ: Tensor, constants: HashConstants,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Row ids of all layers in one launch: int64 [L, B, T, C], absolute in each layer's table.

    `ids` are raw where the constants have a token map (negative ids pass through); `history` holds compressed ids, J at
    least the highest order minus one. `dead`, `start`, `stop` are bool as in reference.look_back. KernelError for other
    types, shapes, devices; for an id outside the vocabulary see the head of this file.
    """
    device = _runs_on(ids_BT)
    layers, depth, columns = len(constants.primes_LC), constants.depth, constants.order_C.numel()
    if ids_BT.dim() != 2 or history_BJ.dim() != 2 or history_BJ.shape[1] < depth - 1:
        raise KernelError(
            f"ids must be [B, T] and history [B, J] with J of at least {depth - 1}, "
            f"found {list(ids_BT.shape)} and {list(history_BJ.shape)}"
        )
    (batch, length), kept = ids_BT.shape, history_BJ.shape[1]
    _fits("ids", ids_BT, (torch.int64,), (batch, length), device)
    _fits("history", history_BJ, (torch.int64,), (batch, kept), device)
    _fits("dead", dead_BT, (torch.bool,), (batch, length), device)
    for name, flags in (("start", start_BJT), ("stop", stop_BJT)):
        _fits(name, flags, (torch.bool,), (batch, kept + length), device)
    _fits("primes", constants.primes_LC, (torch.int64,), (layers, columns), device)
    if device.type == "cpu" and ids_BT.numel():
        least, most = int(ids_BT.min()), int(ids_BT.max())
        if most >= constants.vocab_size or (least < 0 and not constants.negative_ids):
            raise id_outside(ids_BT.numpy(), constants.vocab_size)
    shape = (layers, batch, length, columns)
    out = torch.empty(shape, dtype=torch.int64, device=device) if out is None else out
    _fits("out", out, (torch.int64,), shape, device)
    _launch_hash(ids_BT, dead_BT, start_BJT, stop_BJT, history_BJ, constants, out)
    return out


def _launch_hash(
    ids_BT: Tensor, dead_BT: Tensor, start_BJT: Tensor, stop_BJT: Tensor, history_BJ: Tensor, constants: HashConstants,
    out: Tensor,
) -> None:  # fmt: skip
    layers, batch, length, columns = out.shape
    token_map = constants.token_map_V
    if out.numel():
        with _current(ids_BT.device):
            kernels.hash_rows[(-(-batch * length // HASH_TILE), layers)](
                ids_BT, ids_BT if token_map is None else token_map, dead_BT.view(torch.uint8),
                start_BJT.view(torch.uint8), stop_BJT.view(torch.uint8), history_BJ, constants.multipliers_LX,
                constants.primes_LC, constants.offsets_LC, constants.order_C, out, _fault(ids_BT.device),
                batch * length, length, constants.fill, constants.vocab_size,
                J=history_BJ.shape[1], DEPTH=constants.depth, C=columns, BC=_power_of_two(columns),
                BT=HASH_TILE, MAPPED=token_map is not None, NEGATIVE=constants.negative_ids, SUMS=constants.sums,
                OLDEST_FIRST=constants.oldest_first,
            )  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """The short convolution's weights: norm [M, D], taps [X, W], in any of the float types."""

    norm_MD: Tensor
    weight_XW: Tensor
    dilation: int
    eps: float


def gate_step(
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_norm_MD: Tensor,
    key_norm_MD: Tensor,
    *,
    kind: str,
    eps: float,
    conv: Convolution | None = None,
    past_BPX: Tensor | None = None,
    mask_BT: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """hidden + gated value + SiLU(convolution) and the convolution's inputs of these positions [B, T, X], or None.

    The arguments are those of builders.engram.Gate after its two projections, with one difference: the residual is
    added here. `past` holds the inputs at the positions before (None or fewer than P: the text begins there). Where
    `mask` (bool) is False nothing is added and the convolution sees zeros. Sums are fp32; `out` has hidden's type,
    inputs that of `value`. The convolution takes inputs as they are stored, so that any chunking gives the same bits.
    One launch up to `dilation` positions (decode), else two. KernelError for other types, shapes, devices.
    """
    device = _runs_on(hidden_BTMD)
    floats = (torch.float32, torch.bfloat16)
    if hidden_BTMD.dim() != 4 or kind not in KINDS:
        raise KernelError(
            f"hidden must be [B, T, M, D] and the gate kind one of {', '.join(KINDS)}, "
            f"found {list(hidden_BTMD.shape)} and {kind!r}"
        )
    batch, length, branches, width = hidden_BTMD.shape
    wanted = [
        ("hidden", hidden_BTMD, hidden_BTMD.shape), ("key", key_BTMD, hidden_BTMD.shape),
        ("value", value_BTD, (batch, length, width)), ("query_norm", query_norm_MD, (branches, width)),
        ("key_norm", key_norm_MD, (branches, width)),
    ]  # fmt: skip
    taps = kept = 0
    if conv is not None:
        taps = conv.weight_XW.shape[-1]
        past_BPX = value_BTD.new_empty(batch, 0, branches * width) if past_BPX is None else past_BPX
        kept = past_BPX.shape[1]
        wanted += [
            ("conv norm", conv.norm_MD, (branches, width)), ("past", past_BPX, (batch, kept, branches * width)),
            ("conv weight", conv.weight_XW, (branches * width, taps)),
        ]  # fmt: skip
    out = torch.empty_like(hidden_BTMD) if out is None else out
    for name, tensor, shape in [*wanted, ("out", out, hidden_BTMD.shape)]:
        _fits(name, tensor, (hidden_BTMD.dtype,) if name == "out" else floats, tuple(shape), device)
    if mask_BT is not None:
        _fits("mask", mask_BT, (torch.bool,), (batch, length), device)
    inputs = None if conv is None else value_BTD.new_empty(batch, length, branches * width)
    if not out.numel():
        return out, inputs
    nothing = value_BTD  # stands where a pointer is not read
    mask = nothing if mask_BT is None else mask_BT.view(torch.uint8)
    gate = torch.empty(batch, length, branches, dtype=torch.float32, device=device)
    wide = _power_of_two(width)
    sizes: dict[str, Any] = {
        "M": branches, "D": width, "BD": wide, "MASKED": mask_BT is not None, "W": taps,
        "DILATION": 1 if conv is None else conv.dilation,
        "num_warps": 4 if wide <= 1024 else 8, "enable_fp_fusion": False,
    }  # fmt: skip
    whole = conv is not None and length <= conv.dilation
    norm, weight = (nothing, nothing) if conv is None else (conv.norm_MD, conv.weight_XW)
    past, store = nothing if past_BPX is None else past_BPX, nothing if inputs is None else inputs
    with _current(device):
        kernels.gate_rows[(batch * length, branches)](
            hidden_BTMD, key_BTMD, value_BTD, query_norm_MD, key_norm_MD, mask, gate, norm, weight, past, store, out,
            length, kept, eps, 0.0 if conv is None else conv.eps, KIND=KINDS[kind], WHOLE=whole, **sizes,
        )  # fmt: skip
        if conv is not None and not whole:
            kernels.conv_rows[(batch * length, branches)](
                hidden_BTMD, value_BTD, mask, gate, weight, past, store, out, length, kept, **sizes
            )
    return out, inputs


def check(device: torch.device | str) -> None:
    """Wait for the device; KernelError where an id since the last check was outside its table or vocabulary."""
    fault = _fault(torch.device(device))
    kind, wrong = (int(word) for word in fault.tolist())
    if kind:
        fault.zero_()
        raise KernelError(
            f"{_FAULT_WORDS[kind].format(wrong)} ({device})", hint="the layout and the tables are of different models"
        )


def _runs_on(tensor: Tensor) -> torch.device:
    device = tensor.device
    if (device.type == "cpu") != INTERPRETED or device.type not in ("cpu", "cuda"):
        where = "in Triton's interpreter, on tensors of the CPU" if INTERPRETED else "on tensors of a GPU"
        raise KernelError(
            f"these kernels run {where}, found one on {device}",
            hint="use kernels/cpu.py on the CPU; TRITON_INTERPRET=1 chooses the interpreter, for tests",
        )
    return device


def _fits(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape or tensor.device != device:
        raise KernelError(
            f"{name} must be {' or '.join(str(t).removeprefix('torch.') for t in dtypes)} {list(shape)} on {device}, "
            f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise KernelError(f"{name} must be contiguous, found strides {list(tensor.stride())}")


def _readable(name: str, bytes_NK: Tensor) -> None:
    if bytes_NK.dtype != torch.uint8 or bytes_NK.dim() != 2 or (bytes_NK.shape[1] > 1 and bytes_NK.stride(1) != 1):
        raise KernelError(
            f"{name} must be uint8 of two axes with contiguous rows, found {bytes_NK.dtype} {list(bytes_NK.shape)} "
            f"with strides {list(bytes_NK.stride())}"
        )
    if bytes_NK.device.type == "cpu" and not (INTERPRETED or bytes_NK.is_pinned()):
        raise KernelError(f"{name} lies in host memory that is not pinned", hint="call its pin_memory()")


@lru_cache(maxsize=64)
def _book(code: int, device: torch.device) -> Tensor:
    return torch.tensor(_BOOKS[code].tolist() if code in _BOOKS else [0.0], dtype=torch.float32, device=device)


def _fault(device: torch.device) -> Tensor:
    """[which fault, the id], kept for each device; made outside of any CUDA graph by the first call."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _faults:
        _faults[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return _faults[device]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
