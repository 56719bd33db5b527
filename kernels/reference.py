"""The readable truth of every array operation; the fast paths must equal it (hash and gather bit for bit).

Shape letters: B batch, T positions of this call, J look-back positions kept (highest order minus one), K look-back
distance (0 is the token itself), O orders, H heads, C columns = O * H in order-major, head-minor sequence,
N rows, D hidden width, E memory width, M residual branches, W kernel width.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.kernels.codecs import Bytes, Codec

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.floating]
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]

_LANES = 16  # partial sums of row_errors


class KernelError(EngramError):
    """A path that cannot be had, or an array that an operation cannot take."""


def look_back(
    ids_BT: Ints, dead_BT: Flags, start_BJT: Flags, stop_BJT: Flags, history_BJ: Ints, *, fill: int, depth: int
) -> Ints:
    """The ids at distances 0 … depth-1 of every position, `fill` where the walk back is blocked: int64 [B, T, K].

    The walk from position t is blocked at distance k, and at every larger one, when t itself is dead, when a position
    that it steps over starts a segment (`start`), or when the position reached, or one before it, may not be looked
    at (`stop`: dead, an end-of-document token, or nothing before the first token). `start` and `stop` cover the kept
    history and this call: [B, J + T].
    """
    kept, length = history_BJ.shape[1], ids_BT.shape[1]
    ids_BJT = np.concatenate([history_BJ, ids_BT], axis=1)
    out_BTK = np.empty((*ids_BT.shape, depth), dtype=np.int64)
    blocked_BT = dead_BT.copy()
    out_BTK[..., 0] = np.where(blocked_BT, fill, ids_BT)
    for k in range(1, depth):
        here = slice(kept - k, kept - k + length)
        stepped = slice(kept - k + 1, kept - k + 1 + length)
        blocked_BT |= start_BJT[:, stepped] | stop_BJT[:, here]
        out_BTK[..., k] = np.where(blocked_BT, fill, ids_BJT[:, here])
    return out_BTK


def hash_ngrams(
    tokens_BTK: Ints, multipliers_K: Sequence[int], orders_O: Sequence[int], primes_OH: Sequence[Sequence[int]]
) -> Ints:
    """Head-local row ids, int64 [B, T, C].

    For order n: h = XOR over k < n of tokens[k] * multipliers[k] in wrapping int64, then h mod prime for each head,
    with the modulo of mathematics (never negative).
    """
    columns: list[Ints] = []
    mixed_BT = np.zeros(tokens_BTK.shape[:-1], dtype=np.int64)
    done = 0
    for order, primes_H in zip(orders_O, primes_OH, strict=True):
        for k in range(done, order):
            mixed_BT = mixed_BT ^ (tokens_BTK[..., k] * np.int64(multipliers_K[k]))
        done = order
        columns.append(np.remainder(mixed_BT[..., None], np.asarray(primes_H, dtype=np.int64)))
    return np.concatenate(columns, axis=-1)


def sum_ngrams(tokens_BTK: Ints, multipliers_CK: Ints, moduli_C: Ints) -> Ints:
    """Head-local row ids, int64 [B, T, C]: sum of tokens[k] * multipliers[c, k] in wrapping int64, mod moduli[c]."""
    sums_BTC = np.zeros((*tokens_BTK.shape[:-1], len(moduli_C)), dtype=np.int64)
    for k in range(tokens_BTK.shape[-1]):
        sums_BTC += tokens_BTK[..., k, None] * multipliers_CK[:, k]
    return np.remainder(sums_BTC, moduli_C)


class Hasher:
    """Token ids to row ids, with the constants of a layout: compression, look-back and hash of every layer.

    `token_map` compresses ids (None: raw ids are hashed); `negative_ids`: ids below zero are allowed and pass through
    it. An id in `dead_ids` (or below zero where `dead_negative`) and `reset_id` stop a look-back, see `look_back`; what
    cannot be looked at counts as `fill`. Columns of `primes` and `offsets` are order-major, head-minor. A layer has one
    multiplier for each distance; where `sums`, products are added instead of combined by XOR, and a layer has as many
    multipliers for each column, column after column (0 from the column's order on). Where `oldest_first`, distances are
    counted from the other end: the first multiplier is that of the oldest token that the highest order sees, and an
    order n below it takes the n oldest.
    """

    def __init__(
        self,
        *,
        token_map: Ints | None,
        vocab_size: int,
        negative_ids: bool,
        orders: Sequence[int],
        heads: int,
        multipliers: Sequence[Sequence[int]],
        primes: Sequence[Sequence[int]],
        offsets: Sequence[Sequence[int]],
        dead_ids: Sequence[int],
        dead_negative: bool,
        reset_id: int | None,
        fill: int,
        sums: bool = False,
        oldest_first: bool = False,
    ) -> None:
        self.token_map, self.vocab_size, self.negative_ids = token_map, vocab_size, negative_ids
        self.orders, self.heads, self.multipliers = orders, heads, multipliers
        self.primes, self.offsets = primes, offsets
        self.dead_ids, self.dead_negative, self.reset_id, self.fill = dead_ids, dead_negative, reset_id, fill
        self.sums, self.oldest_first = sums, oldest_first

    def compress(self, ids: Ints) -> Ints:
        """Compressed ids, elementwise; KernelError for an id outside the vocabulary."""
        if ids.size and (int(ids.max()) >= self.vocab_size or (not self.negative_ids and int(ids.min()) < 0)):
            raise id_outside(ids, self.vocab_size)
        if self.token_map is None:
            return ids
        return np.where(ids >= 0, self.token_map[np.maximum(ids, 0)], ids)

    def flags(self, ids: Ints) -> tuple[Flags, Flags]:
        """Where a walk back may not begin (dead), and where it may not go."""
        dead = np.isin(ids, self.dead_ids) if self.dead_ids else np.zeros(ids.shape, dtype=bool)
        if self.dead_negative:
            dead = dead | (ids < 0)
        return dead, dead if self.reset_id is None else dead | (ids == self.reset_id)

    def rows(
        self,
        ids_BT: Ints,
        start_BT: Flags | None,
        past_ids_BJ: Ints,
        past_start_BJ: Flags,
        past_stop_BJ: Flags,
        layers: Sequence[int],
        local: bool,
    ) -> list[Ints]:
        """Row ids [B, T, C] of each of the layers (their places in the constants), head-local where `local`.

        `start_BT` marks positions that begin a segment; past_… are the J compressed ids and flags before this call.
        Raises KernelError for an id outside the vocabulary.
        """
        dead_BT, stop_BT = self.flags(ids_BT)
        start_BT = np.zeros(ids_BT.shape, dtype=bool) if start_BT is None else start_BT
        tokens_BTK = look_back(
            self.compress(ids_BT), dead_BT, np.concatenate([past_start_BJ, start_BT], axis=1),
            np.concatenate([past_stop_BJ, stop_BT], axis=1), past_ids_BJ, fill=self.fill, depth=self.orders[-1],
        )  # fmt: skip
        tokens_BTK = tokens_BTK[..., ::-1] if self.oldest_first else tokens_BTK
        out = []
        for layer in layers:
            if self.sums:
                multipliers_CK = np.array(self.multipliers[layer], dtype=np.int64).reshape(-1, self.orders[-1])
                found = sum_ngrams(tokens_BTK, multipliers_CK, np.array(self.primes[layer], dtype=np.int64))
            else:
                primes = self.primes[layer]
                primes_OH = [primes[i : i + self.heads] for i in range(0, len(primes), self.heads)]
                found = hash_ngrams(tokens_BTK, self.multipliers[layer], self.orders, primes_OH)
            out.append(found if local else found + np.asarray(self.offsets[layer], dtype=np.int64))
        return out


def id_outside(ids: Ints, vocab_size: int) -> KernelError:
    """The error for a token id that the vocabulary does not have."""
    outsider = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
    return KernelError(
        f"token id {outsider} is outside the layout's vocabulary of {vocab_size} ids",
        hint="the text was tokenized by another tokenizer than the one that the layout was built for",
    )


def gather(
    codec: Codec,
    table_NK: Bytes,
    rows: Ints,
    out: NDArray[Any] | None = None,
    *,
    width: int | None = None,
    threads: int = 1,
) -> NDArray[Any]:
    """Rows of a table in memory, decoded, those of the last axis side by side: [..., C] to [..., C * D].

    `table_NK` is uint8, its rows may lie apart. `out` is contiguous float32, or uint16 for bf16; where it is not given,
    float32 rows of `width` values are made. `threads` is how many may work (the reference uses one).

    Raises KernelError for arrays of another kind and for a row outside the table, before anything is written.
    """
    rows, out, width = prepare_gather(codec, table_NK, rows, out, width)
    outside = np.flatnonzero((rows.ravel() < 0) | (rows.ravel() >= len(table_NK)))
    if outside.size:
        raise row_outside(rows, int(outside[0]), len(table_NK))
    if rows.size:
        codec.decode(table_NK[rows.ravel()], width, out=out.reshape(-1, width))
    return out


def encode(
    codec: Codec, rows_ND: Singles, *, table: str = "table", first_row: int = 0, threads: int = 1
) -> Bytes:
    """float32 [N, D] to uint8 [N, K]: codec.encode; `threads` is how many may work (the reference uses one).

    Raises CodecError for a width that the codec cannot hold; for a value that is NaN or infinite, or that needs a scale
    which does not fit, it names `table` and the row, counted from `first_row`.
    """
    return codec.encode(rows_ND, table=table, first_row=first_row)


def row_errors(codec: Codec, bytes_NK: Bytes, rows_ND: Singles, *, threads: int = 1) -> tuple[Doubles, Doubles]:
    """What encoding lost, row by row: sums of (decoded - x)² and of x² over D, each float64 [N].

    The difference is rounded to fp32, all else is fp64. Every 16th value goes to the same partial sum; those are added
    in pairs: (i, i + 8), (i, i + 4), (i, i + 2), (i, i + 1). CodecError for bytes of another size.
    """
    check_error_rows(codec, bytes_NK, rows_ND)
    with np.errstate(over="ignore", invalid="ignore"):
        lost_ND = codec.decode(bytes_NK, rows_ND.shape[1]) - rows_ND
        return _square_sums(lost_ND), _square_sums(rows_ND)


def check_error_rows(codec: Codec, bytes_NK: Bytes, rows_ND: Singles) -> None:
    """Refuse rows of another type, and rows that are not as many as the encoded ones; decoding checks the rest."""
    if rows_ND.ndim != 2 or rows_ND.dtype != np.float32 or len(rows_ND) != len(bytes_NK):
        raise KernelError(
            f"row_errors of {codec.name} takes float32 [{len(bytes_NK)}, D] beside the encoded rows, found "
            f"{rows_ND.dtype} {list(rows_ND.shape)}"
        )


def _square_sums(values_ND: Singles) -> Doubles:
    count, width = values_ND.shape
    values = np.zeros((count, -(-width // _LANES), _LANES))
    values.reshape(count, values.shape[1] * _LANES)[:, :width] = values_ND
    sums = np.zeros((count, _LANES))
    for step in range(values.shape[1]):
        sums += np.square(values[:, step])
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def aligned_empty(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """np.empty that begins on a cache line where it is large.

    A vector store of 64 bytes that straddles two lines costs two: numpy aligns to 16 bytes only. Small arrays stay in
    the nearest cache, where it does not show.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < 1 << 16:
        return np.empty(shape, dtype=dtype)
    raw = np.empty(size + 64, dtype=np.uint8)
    begin = -raw.__array_interface__["data"][0] % 64
    out: NDArray[Any] = raw[begin : begin + size].view(dtype).reshape(shape)
    return out


def prepare_gather(
    codec: Codec, table_NK: Bytes, rows: Ints, out: NDArray[Any] | None, width: int | None
) -> tuple[Ints, NDArray[Any], int]:
    """Contiguous row ids, a place for the values and the row width; KernelError for what does not fit together."""
    if rows.dtype != np.int64 or not rows.ndim:
        raise KernelError(f"row ids must be int64 [..., C], found {rows.dtype} {list(rows.shape)}")
    if width is None:
        width = out.size // rows.size if out is not None and rows.size else 0
    shape = (*rows.shape[:-1], rows.shape[-1] * width)
    if out is None:
        if not width:
            raise KernelError("gather needs `out` or `width`")
        out = aligned_empty(shape, np.float32)
    if out.size != rows.size * width or not out.flags.c_contiguous or out.dtype not in (np.float32, np.uint16):
        raise KernelError(
            f"out must be contiguous float32 or uint16 (bf16) {list(shape)}, found {out.dtype} {list(out.shape)}"
        )
    if rows.size and (table_NK.ndim != 2 or table_NK.dtype != np.uint8 or table_NK.strides[1] != 1
                      or table_NK.shape[1] != codec.row_bytes(width)):  # fmt: skip
        raise KernelError(
            f"a table of {codec.name} rows of {width} values is uint8 [N, {codec.row_bytes(width)}], found "
            f"{table_NK.dtype} {list(table_NK.shape)}"
        )
    return np.ascontiguousarray(rows), out, width


def row_outside(rows: Ints, place: int, count: int) -> KernelError:
    """The error for a row that the table does not have."""
    return KernelError(
        f"row {int(rows.ravel()[place])} is outside the table, which has {count} rows",
        hint="the rows were hashed with another layout than the table's",
    )


def scatter_add(rows_N: Ints, values_ND: NDArray[np.float32]) -> tuple[Ints, NDArray[np.float32]]:
    """Distinct rows, ascending [U], and the sum of each one's values [U, D], added in order of appearance from 0."""
    rows_U, place = np.unique(rows_N, return_inverse=True)
    sums_UD = np.zeros((len(rows_U), values_ND.shape[1]), dtype=np.float32)
    np.add.at(sums_UD, place, values_ND)
    return rows_U, sums_UD


def split_rows(records_B4: NDArray[np.uint64], rows_N: Ints) -> tuple[list[int], Ints, Ints]:
    """Which of four classes rows belong to: how many each class has, their places in the request, their ranks.

    A record is of 64 rows: the low and the high bit of each row's class, then as four uint32 the rows of class 1, 2 and
    3 before it, and 0 (quantize/FORMAT.md 1.7). A row's rank is the number of rows of its class before it. Places and
    ranks stand class by class, within a class as they were asked for. KernelError for a row without a record.
    """
    outside = np.flatnonzero((rows_N < 0) | (rows_N >= 64 * len(records_B4)))
    if outside.size:
        raise row_outside(rows_N, int(outside[0]), 64 * len(records_B4))
    one, half = np.uint64(1), np.uint64(32)
    found_N4 = records_B4[rows_N >> 6]
    bit = (rows_N & 63).astype(np.uint64)
    low, high = (found_N4[:, 0] >> bit) & one, (found_N4[:, 1] >> bit) & one
    class_N = (low | high << one).astype(np.intp)
    # A plane where the row's bit is 1, its opposite where it is 0: rows of the same class are ones in both.
    same = (found_N4[:, 0] ^ (low - one)) & (found_N4[:, 1] ^ (high - one)) & ((one << bit) - one)
    before = np.empty((len(rows_N), 4), dtype=np.int64)
    before[:, 1], before[:, 2] = found_N4[:, 2] & np.uint64(0xFFFFFFFF), found_N4[:, 2] >> half
    before[:, 3] = found_N4[:, 3] & np.uint64(0xFFFFFFFF)
    before[:, 0] = (rows_N & ~63) - before[:, 1:].sum(axis=1)
    ranks_N = before[np.arange(len(rows_N)), class_N] + np.bitwise_count(same)
    places_N = np.argsort(class_N, kind="stable").astype(np.int64)
    return np.bincount(class_N, minlength=4).tolist(), places_N, ranks_N[places_N]


def crc32_pages(pages_PX: Bytes) -> NDArray[np.uint32]:
    """CRC-32 of every page, as zlib computes it: uint8 [P, X] to uint32 [P]."""
    return np.array([zlib.crc32(page.tobytes()) for page in pages_PX], dtype=np.uint32)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / sqrt(mean(x²) + eps) * weight over the last axis."""
    out: Floats = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight
    return out


def signed_sqrt(score: Floats, *, zero_is_positive: bool) -> Floats:
    """sign(s) * sqrt(max(|s|, 1e-6)); at s = 0 the sign is 0 (demo) or that of the zero's bit (V4.1's copysign)."""
    root = np.sqrt(np.maximum(np.abs(score), 1e-6))
    out: Floats = np.copysign(root, score) if zero_is_positive else np.sign(score) * root
    return out


def gate(
    hidden_BTMD: Floats, key_BTMD: Floats, query_norm_MD: Floats, key_norm_MD: Floats, *, eps: float, kind: str
) -> Floats:
    """How far each branch opens to the memory, 0 … 1: [B, T, M].

    score = <rms_norm(key), rms_norm(hidden)> / sqrt(D); `kind` is "plain" (sigmoid of the score, the paper's equation
    4), "sqrt" (of its signed square root, demo and Qwen) or "copysign" (the same with V4.1's treatment of zero).
    """
    width = hidden_BTMD.shape[-1]
    query = rms_norm(hidden_BTMD, query_norm_MD, eps)
    key = rms_norm(key_BTMD, key_norm_MD, eps)
    score = np.sum(query * key, axis=-1) / np.sqrt(width)
    if kind != "plain":
        score = signed_sqrt(score, zero_is_positive=kind == "copysign")
    out: Floats = 1.0 / (1.0 + np.exp(-score))
    return out


def short_conv(x_BTD: Floats, past_BPD: Floats, weight_DW: Floats, dilation: int) -> Floats:
    """Causal depthwise convolution over time, then SiLU: [B, T, D].

    Tap i of W reads position t - (W - 1 - i) * dilation; `past` holds the P = (W - 1) * dilation inputs before this
    call (zeros before the start of the text).
    """
    taps = weight_DW.shape[1]
    length = x_BTD.shape[1]
    full = np.concatenate([past_BPD, x_BTD], axis=1)
    out = np.zeros_like(x_BTD)
    for i in range(taps):
        begin = past_BPD.shape[1] - (taps - 1 - i) * dilation
        out += full[:, begin : begin + length] * weight_DW[:, i]
    activated: Floats = out / (1.0 + np.exp(-out))
    return activated


@dataclass(frozen=True)
class Convolution:
    """The short convolution's weights: norm [M, D] of its inputs, taps [M * D, W]."""

    norm_MD: Floats
    weight_XW: Floats
    dilation: int
    eps: float


def gate_step(
    hidden_BTMD: Floats,
    key_BTMD: Floats,
    value_BTD: Floats,
    query_norm_MD: Floats,
    key_norm_MD: Floats,
    *,
    kind: str,
    eps: float,
    conv: Convolution | None = None,
    past_BPX: Floats | None = None,
    mask_BT: Flags | None = None,
) -> tuple[Floats, Floats | None]:
    """hidden + gate * value + short_conv of its norm, and the convolution's inputs [B, T, X] (X = M * D) or None.

    `past` holds those inputs at the positions before: None or fewer than (W - 1) * dilation where the text begins
    there. Where `mask` is False nothing is added, and the convolution sees zeros.
    """
    batch, length, branches, width = hidden_BTMD.shape
    open_BTM = gate(hidden_BTMD, key_BTMD, query_norm_MD, key_norm_MD, eps=eps, kind=kind)
    if mask_BT is not None:
        open_BTM = open_BTM * mask_BT[..., None]
    added_BTMD = open_BTM[..., None] * value_BTD[..., None, :]
    if conv is None:
        return hidden_BTMD + added_BTMD, None
    inputs_BTX = rms_norm(added_BTMD, conv.norm_MD, conv.eps).reshape(batch, length, branches * width)
    reach = (conv.weight_XW.shape[1] - 1) * conv.dilation
    full_BPX = np.zeros((batch, reach, branches * width), dtype=inputs_BTX.dtype)
    if past_BPX is not None and past_BPX.shape[1]:
        full_BPX[:, reach - past_BPX.shape[1] :] = past_BPX
    mixed_BTX = short_conv(inputs_BTX, full_BPX, conv.weight_XW, conv.dilation)
    added_BTMD = added_BTMD + mixed_BTX.reshape(added_BTMD.shape)
    if mask_BT is not None:
        added_BTMD = added_BTMD * mask_BT[..., None, None]
    return hidden_BTMD + added_BTMD, inputs_BTX


class MemoryGate:
    """One layer's gate with its weights, for a few positions: memory and the residual stream in, the stream out.

    Letters as in builders/engram.py; Y = M * D. Weights are float32: key [Y, E], value [D, E] (these two may be
    float16: they are widened, which is exact), biases [Y] and [D] or None, norms [M, D].
    """

    def __init__(
        self,
        *,
        key_weight_YE: Floats,
        key_bias_Y: Singles | None,
        value_weight_DE: Floats,
        value_bias_D: Singles | None,
        query_norm_MD: Singles,
        key_norm_MD: Singles,
        kind: str,
        eps: float,
        conv: Convolution | None = None,
    ) -> None:
        self.key_weight_YE, self.key_bias_Y = key_weight_YE, key_bias_Y
        self.value_weight_DE, self.value_bias_D = value_weight_DE, value_bias_D
        self.query_norm_MD, self.key_norm_MD, self.kind, self.eps, self.conv = (
            query_norm_MD, key_norm_MD, kind, eps, conv,
        )  # fmt: skip

    def step(
        self,
        hidden_BTMD: Singles,
        memory_BTE: Singles,
        past_BPX: Singles | None = None,
        mask_BT: Flags | None = None,
        *,
        out_BTMD: Singles | None = None,
    ) -> tuple[Singles, Singles | None]:
        """As `gate_step`, with key and value projected from the memory; `out` may be `hidden` itself."""
        key = memory_BTE @ self.key_weight_YE.T + (0 if self.key_bias_Y is None else self.key_bias_Y)
        value = memory_BTE @ self.value_weight_DE.T + (0 if self.value_bias_D is None else self.value_bias_D)
        found, inputs = gate_step(
            hidden_BTMD, key.reshape(hidden_BTMD.shape), value, self.query_norm_MD, self.key_norm_MD, kind=self.kind,
            eps=self.eps, conv=self.conv, past_BPX=past_BPX, mask_BT=mask_BT,
        )  # fmt: skip
        if out_BTMD is None:
            return found, inputs
        out_BTMD[...] = found
        return out_BTMD, inputs
